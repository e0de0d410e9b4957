"""What ``--dry-run`` shows: the plan of each step, and with ``--calibrate`` what it would take."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jobs.commands.errors import printable
from jobs.page.amounts import count, duration, price, short, size
from jobs.schema.defaults import as_yaml

if TYPE_CHECKING:
    from jobs.dry_run import DryRun
    from pipeline.run.driver import Plan


def show(plans: Sequence[DryRun]) -> None:
    """Print a block for each step."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for dry in plans:
        told = list(facts(dry))
        left = max(len(name) for name, _ in told) + 2
        console.print(Text(printable(f"{dry.name} -> {dry.output}"), style="bold"), soft_wrap=True)
        for name, text in told:
            first, *others = _wrapped(printable(text), max(40, console.width - left - 1))
            console.print(Text.assemble((f" {name:{left}}", "dim"), first), soft_wrap=True)
            for line in others:
                console.print(Text(" " * (left + 1) + line), soft_wrap=True)
        lines = ["# in force, and not in the file (add to a block that is there already):", *as_yaml(dry.job), ""]
        console.print(Text(printable("\n".join(lines)), style="dim"), soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text; no path or address is broken, so that it can be copied."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def facts(dry: DryRun) -> Iterator[tuple[str, str]]:
    """Name and text of each line."""
    if dry.plan is None:
        yield "plan", dry.why
    else:
        yield from _planned(dry, dry.plan)
    yield "workers", _workers(dry)
    if dry.plan is not None and dry.plan.shards < _most(dry):
        shards, workers = count(dry.plan.shards, "shard"), count(dry.plan.shards, "worker")
        gives = f"{shards} give{'s' * (dry.plan.shards == 1)} work to {workers} only"
        yield "note", f"{gives}; a smaller `shard_rows` gives it to more"
    if dry.memory:
        yield "GPU memory", dry.memory
    if dry.lacking:
        yield "does not fit", f"a worker asks for {dry.lacking}: lower `resources`, or name a cluster with --address"
    if dry.calibration is None or dry.seconds is None or dry.workers is None or dry.worker_hours is None:
        return
    timed = dry.calibration
    yield "sample", f"{count(timed.rows, 'row')} in {duration(timed.seconds)}, {timed.failed} failed"
    yield "a row", f"{short(timed.seconds_per_row)}, {size(timed.bytes_per_row)}"
    fits = "" if timed.fits >= dry.workers else f" ({timed.fits} fit at present)"
    hours = f"{dry.worker_hours:.2g} worker-hours"
    yield "time", f"about {duration(dry.seconds)} on {count(dry.workers, 'worker')}{fits}, {hours}"
    yield "cost", "set resources.price_per_worker_hour" if dry.cost is None else f"about {price(dry.cost)}"


def _planned(dry: DryRun, plan: Plan) -> Iterator[tuple[str, str]]:
    yield "rows", f"{plan.rows:,}"
    yield "shards", f"{plan.shards:,} of {dry.job.shard_rows:,} rows"
    bulk = f"{count(plan.files, 'file')}, {size(plan.input_bytes)}, " if plan.input_bytes else ""
    yield "input", f"{bulk}{plan.format}"
    yield "columns", ", ".join(plan.columns)
    for note in plan.notes:
        yield "note", note
    for role, model in plan.models.items():
        yield f"model: {role}", str(model.get("path", ""))
    if dry.calibration is None:
        yield "output", f"about {size(plan.estimated_bytes)}, going by the columns' types"
    else:
        yield "output", f"about {size(dry.calibration.bytes_per_row * plan.rows)}, going by the sample"
    yield "fingerprint", plan.fingerprint


def _workers(dry: DryRun) -> str:
    pool = dry.job.resources
    least, most = pool.workers.min, pool.workers.max
    bounds = f"{least}" if least == most else f"{least} to {most or 'as many as fit'}"
    each = [f"{pool.cpus:g} CPU", f"{pool.gpus:g} GPU" if pool.gpus else "", size(pool.memory) if pool.memory else ""]
    return f"{bounds}, each {', '.join(filter(None, each))}"


def _most(dry: DryRun) -> int:
    return dry.job.resources.workers.max or dry.job.resources.workers.min
