"""``latentmill failed``: which rows failed, and why."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.errors import cell, errors, printable
from jobs.commands.stores import StorageOptions, reaching

if TYPE_CHECKING:
    from pipeline.output.dataset import Output
    from pipeline.output.failed import FailedRow

SHOWN = 20


def failed(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run, here or on a store.")],
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print all as CSV: step, id, shard, error; ' before what is a formula.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON, a line a row.")] = False,
    storage_options: StorageOptions = None,
) -> None:
    """List the rows that failed, with their reasons.

    Also while the run goes on. `latentmill run-job JOB.yaml --retry-failed` does them again.
    """
    from jobs.kinds.chain import read_listing
    from pipeline.output.dataset import Output
    from pipeline.output.failed import failed_rows
    from pipeline.output.planfile import load_plan
    from pipeline.storage import Folder

    table = csv.writer(sys.stdout, lineterminator="\n")
    with errors(), reaching(out, storage_options):
        if as_csv:
            table.writerow(["step", "id", "shard", "error"])
        for step in read_listing(out) or [{"name": "", "output": out}]:
            if step["name"] and load_plan(Folder.at(step["output"])) is None:
                continue  # a step of a chain that has not begun
            output = Output.open(step["output"])
            if as_csv or as_json:
                for row in failed_rows(output):
                    plain = [step["name"], row.id, row.shard, row.error]
                    if as_csv:
                        table.writerow(cell(str(value)) for value in plain)
                    else:
                        typer.echo(json.dumps(dict(zip(("step", "id", "shard", "error"), plain, strict=True))))
            else:
                _show(output, failed_rows(output), step["name"])


def _show(output: Output, rows: Iterator[FailedRow], step: str) -> None:
    from pipeline.output.commit import Reasons

    first: list[FailedRow] = []
    reasons = Reasons()
    for row in rows:
        reasons.add(row.error)
        if len(first) < SHOWN:
            first.append(row)
    left = int(output.plan["shards"]) - output.committed()
    unfinished = f"; {left:,} of {int(output.plan['shards']):,} shards are not done yet" if left else ""
    planned = int(output.plan["rows"])
    typer.echo(f"{f'{step}: ' if step else ''}{reasons.rows:,} of {planned:,} rows failed{unfinished}")
    for reason, times in reasons.commonest().items():
        typer.echo(f"  {times:,} x {printable(reason)}")
    for row in first:
        typer.echo(f"{printable(row.id)}  (shard {row.shard}): {printable(row.error)}")
    if reasons.rows > len(first):
        typer.echo(f"... and {reasons.rows - len(first):,} more; --csv prints all")
