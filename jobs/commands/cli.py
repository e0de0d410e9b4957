"""The command ``latentmill``: a plain Typer app over `jobs.run`, `jobs.report` and `pipeline.output.dataset`.

Nothing heavy is imported before a command runs, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands import (
    compbench,
    diff,
    doctor,
    examples,
    export,
    failed,
    init,
    push,
    search,
    status,
    submit,
    try_concept,
    view,
)
from jobs.commands.errors import (
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    as_json_lines,
    errors,
    note,
    printable,
    stderr,
    stop,
    terminable,
)
from jobs.commands.noise import LOG, quiet
from jobs.commands.options import Output, Overrides
from jobs.commands.stores import StorageOptions, parsed, reaching

if TYPE_CHECKING:
    from jobs.run import JobResult
    from pipeline.output.progress import Progress

PROGRAM = "latentmill"

app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A stopped or killed run goes on where it was when the same command is started again.",
)


class LogFormat(StrEnum):
    """Of what a run says while it goes on."""

    TEXT = "text"
    JSON = "json"


Out = Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run, here or on a store.")]


def _job_files(incomplete: str) -> list[str]:
    """Shell completion: YAML files and folders."""
    folder = Path(incomplete).parent
    found = [path for path in folder.glob("*") if path.suffix in (".yaml", ".yml") or path.is_dir()]
    return [str(path) for path in found if str(path).startswith(incomplete)]


def _version(asked: bool) -> None:
    if asked:
        from pipeline.run.versions import versions

        typer.echo(f"{PROGRAM} {versions().get(PROGRAM, '(not installed)')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Invert whole datasets through frozen generative models. A job file in, a sharded Parquet dataset out."""


def run_job(
    job: Annotated[
        Path, typer.Argument(metavar="JOB.yaml", help="The job file.", autocompletion=_job_files, show_default=False)
    ],
    output: Output = None,
    settings: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="RAY", help="A running Ray: auto, host:port or ray://host:port; else one is started."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first so many rows.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do the rows again that failed in earlier starts.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="With --dry-run: time a sample, and estimate time and cost.")
    ] = False,
    sample: Annotated[int, typer.Option(min=1, metavar="N", help="Rows that --calibrate times.")] = 64,
    track: Annotated[
        str | None,
        typer.Option(metavar="KIND[:PLACE]", help="Also tell tensorboard:DIR, wandb:PROJECT or mlflow:URI."),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Progress in words, or an object a line.")] = LogFormat.TEXT,
    storage_options: StorageOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a job file, or go on with what was stopped.

    Exit code 0 means that every planned row is committed and published; 1 that it is not; 2 that the job cannot be
    used as it is; 130 that it was interrupted, and goes on when started again.
    """
    lines = log_format is LogFormat.JSON
    with as_json_lines(lines), errors(), terminable():
        from dataclasses import asdict

        from jobs import dry_run as planner
        from jobs import run as runner
        from jobs.commands import json_lines, plan_table, progress_line
        from jobs.commands.track import tracking
        from jobs.schema import reading

        if calibrate and not dry_run:
            stop("--calibrate belongs to --dry-run")
        if retry_failed and dry_run:
            stop("--retry-failed runs the job; `latentmill failed OUT` lists what it would do again")
        described = reading.load(job, settings or (), note)
        options = {**described.storage_options, **parsed(storage_options)}
        described = described.model_copy(update={"storage_options": options})
        target = output or described.output
        if dry_run:
            rows, folder = sample if calibrate else 0, target or "out"
            with quiet():
                plans = list(planner.plan_job(described, folder, address=address, limit=limit, calibrate_rows=rows))
            typer.echo(json.dumps([dry.to_json() for dry in plans])) if as_json else plan_table.show(plans)
            return
        settled = described.model_dump(mode="json", exclude_unset=True)
        shown = json_lines.shown if lines else progress_line.shown
        with ExitStack() as stack:
            show = stack.enter_context(shown(stack.enter_context(quiet(target))))
            tracked = stack.enter_context(tracking(track, target or "out", settled, partial(_say, show)))

            def progress(snapshot: Progress) -> None:
                show(snapshot)
                if tracked is not None:
                    tracked.progress(snapshot)

            result = runner.run_job(
                described, output=output, address=address, limit=limit, progress=progress, retry_failed=retry_failed
            )
            if tracked is not None:
                tracked.result(result)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    if lines:
        again = {"again": f"latentmill {_again()}"} if result.state == "interrupted" else {}
        json_lines.write("result", {**asdict(result), **again})
    elif not as_json:
        _print_result(result, described.job)
    if result.state == "interrupted":
        if not lines:
            stderr().print(f"Stopped. To go on: [bold]latentmill {_again()}[/bold]", soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.state != "complete":
        raise typer.Exit(EXIT_INCOMPLETE)


def verify(
    out: Out,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    checksums: Annotated[
        bool, typer.Option("--checksums/--no-checksums", help="Compare every file's digest with its record.")
    ] = True,
    storage_options: StorageOptions = None,
) -> None:
    """Check an output: every planned id in it exactly once?

    All files are read and compared with their records. Exit code 0 means yes.
    """
    with errors(), reaching(out, storage_options):
        from dataclasses import asdict

        from jobs.kinds.chain import read_listing
        from pipeline.output.verify import verify as verified

        steps = read_listing(out) or [{"name": "", "output": out}]
        reports = {step["name"]: verified(step["output"], checksums=checksums) for step in steps}
    if as_json:
        plain = {name: asdict(report) for name, report in reports.items()}
        everything = {"ok": all(report.ok for report in reports.values()), "steps": plain}
        typer.echo(json.dumps(everything if len(steps) > 1 else next(iter(plain.values()))))
    else:
        for name, report in reports.items():
            prefix = f"{name}: " if name else ""
            verdict = "ok" if report.ok else "NOT OK"
            typer.echo(
                f"{prefix}{verdict}: {report.planned:,} rows planned, {report.found:,} found "
                f"({report.rows_ok:,} ok, {report.rows_failed:,} failed{_twins(report.rows_duplicate)})"
            )
            for problem in report.problems:
                typer.echo(f"  {printable(problem)}")
            for name in report.foreign:
                typer.echo(f"  foreign file: {printable(name)}")
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(EXIT_INCOMPLETE)


def report(out: Out, storage_options: StorageOptions = None) -> None:
    """Write OUT/report.html again: one page, which works offline."""
    with errors(), reaching(out, storage_options):
        from jobs.report import write_report

        typer.echo(write_report(out))


def schema() -> None:
    """Print the JSON schema of job files, which editors read."""
    from jobs.schema.json_schema import job_schema

    typer.echo(json.dumps(job_schema(), indent=2))


for _command in (  # in the order in which they are needed
    init.init,
    examples.examples,
    doctor.doctor,
    run_job,
    submit.submit,
    status.status,
    failed.failed,
    verify,
    report,
    view.view,
    search.search,
    diff.diff,
    export.export,
    push.push,
    try_concept.try_concept,
    compbench.compbench,
    schema,
):
    app.command()(_command)


def _say(show: Callable[[Progress], None], message: str) -> None:
    from pipeline.output.progress import Progress

    show(Progress("running", message=message))


def _twins(count: int) -> str:
    return f", {count:,} duplicates" if count else ""


def _again() -> str:
    import shlex

    return " ".join(shlex.quote(argument) for argument in sys.argv[1:])


def _print_result(result: JobResult, kind: str) -> None:
    from jobs.page.amounts import duration

    style = {"complete": "green", "interrupted": "yellow"}.get(result.state, "red")
    console = stderr()
    console.print(
        f"[bold {style}]{result.state}[/]  {result.planned:,} rows: {result.ok:,} ok, {result.failed:,} failed"
        f"{_twins(result.duplicates)}"
        f"  ({duration(result.seconds)}, {kind})",
        soft_wrap=True,
    )
    if result.reason:
        console.print(f"  {printable(result.reason)}", markup=False, soft_wrap=True)
    for reason, count in list(result.errors.items())[:5]:
        console.print(f"  {count:,} x {printable(reason)}", markup=False, soft_wrap=True)
    log = Path(result.output) / LOG
    if result.state == "failed" and log.is_file():
        console.print(f"  what libraries said is in {log}", markup=False, soft_wrap=True)
    if result.failed and result.state == "complete":
        console.print(
            f"  `latentmill failed {result.output}` lists the failed rows; run-job --retry-failed does them again",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if result.report:
        typer.echo(f"report: {result.report}")


def main() -> None:
    """All commands, by the arguments of this process."""
    app(prog_name=PROGRAM)
