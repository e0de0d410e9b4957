"""``latentmill doctor``: is everything there that runs, or one job, need? A line each, with what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.errors import EXIT_INCOMPLETE, errors, note, printable
from jobs.commands.stores import StorageOptions, parsed

if TYPE_CHECKING:
    from jobs.commands.checks import Finding

NAME_WIDTH = 22
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


def doctor(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="Also look at what this job names.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUT", help="Replaces the job's `output`.")
    ] = None,
    address: Annotated[str | None, typer.Option(metavar="RAY", help="A running Ray, as for run-job.")] = None,
    storage_options: StorageOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of findings as JSON.")] = False,
) -> None:
    """Check this machine, and what a job needs of it.

    Packages, GPUs, memory, stores, Ray, input and models. Exit code 0 means that nothing stands in the way; 1 that
    something does.
    """
    found: list[Finding] = []
    with errors():
        from jobs.commands.noise import quiet

        with quiet():
            for finding in _findings(job, output, address, parsed(storage_options)):
                found.append(finding)
                if not as_json:
                    _show(finding)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    if any(finding.state == "fail" for finding in found):
        raise typer.Exit(EXIT_INCOMPLETE)


def _findings(
    path: Path | None, output: str | None, address: str | None, given: dict[str, object]
) -> Iterator[Finding]:
    from jobs.commands import checks
    from jobs.schema import reading

    yield from checks.machine()
    yield checks.cluster(address)
    if path is None:
        return
    try:
        job = reading.load(path, tell=note)
    except reading.JobFileError as error:
        yield checks.Finding("job file", "fail", str(error), "correct it there")
        return
    yield checks.Finding("job file", "ok", f"{path}: {job.job}")
    job = job.model_copy(update={"storage_options": {**job.storage_options, **given}})
    yield from checks.of_job(job, output or job.output or "out", address)


def _show(finding: Finding) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sign, style = MARKS[finding.state]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(width=1)
    table.add_column(width=NAME_WIDTH, style="dim", overflow="fold")
    table.add_column(overflow="fold")
    text = Text(printable(finding.found))
    if finding.todo:
        text.append(f"\n→ {printable(finding.todo)}", style="bold")
    table.add_row(Text(sign, style=style), finding.name, text)
    Console().print(table)
