"""``latentmill diff``: what two runs of one kind have in common, and what not."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.errors import EXIT_INCOMPLETE, cell, errors, printable
from jobs.commands.single import single
from jobs.commands.stores import StorageOptions, reaching

if TYPE_CHECKING:
    from pipeline.output.diff import ColumnDiff, Diff, Difference

HEAD = ["id", "what", "a", "b", "max_abs", "relative"]


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Output folder of a run, here or on a store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind of job.")],
    columns: Annotated[
        list[str] | None, typer.Option("--columns", metavar="NAME", help="Only this column; may be repeated.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, metavar="X", help="Numbers x and y are equal up to this times max(1, |x|, |y|).")
    ] = 0.0,
    as_csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every difference, a line each.")
    ] = None,
    storage_options: StorageOptions = None,
) -> None:
    """Compare two runs row by row.

    Ids, statuses, and every column of the rows that are ok in both.

    Exit code 0: they are the same; 1: they differ; 2: they cannot be compared.
    """
    with errors(), reaching(a, storage_options), reaching(b, storage_options):
        from pipeline.output.diff import diff as compared

        for out in (a, b):
            single(out, "compare")
        with nullcontext() if as_csv is None else open(as_csv, "w", encoding="utf-8", newline="") as file:
            table = None if file is None else csv.writer(file, lineterminator="\n")

            def tell(found: Difference) -> None:
                if table is not None:
                    numbers = ["" if value is None else f"{value:.9g}" for value in (found.max_abs, found.relative)]
                    table.writerow([*map(cell, (found.id, found.what, found.a, found.b)), *numbers])

            if table is not None:
                table.writerow(HEAD)
            found = compared(a, b, columns, tolerance, tell)
    for line in _lines(found):
        typer.echo(printable(line))
    if not found.same:
        raise typer.Exit(EXIT_INCOMPLETE)


def _lines(found: Diff) -> list[str]:
    """What people read."""
    told = [f"{path} is unfinished: only what is committed is compared" for path in found.unfinished]
    told.append(
        f"A {found.rows_a:,} rows, B {found.rows_b:,} rows; in both {found.both:,}, only in A {found.only_a:,}, "
        f"only in B {found.only_b:,}"
    )
    told += [f"status: {count:,} x {one} in A, {other} in B" for (one, other), count in found.statuses.most_common()]
    told += found.missing
    width = max(map(len, found.columns), default=0)
    told += [f"{name:{width}}  {_told(column)}" for name, column in found.columns.items()]
    return told


def _told(column: ColumnDiff) -> str:
    if not column.different:
        return f"same in {column.compared:,}"
    told = f"differs in {column.different:,} of {column.compared:,}"
    if column.max_abs is not None:
        told += f", by {column.max_abs:.3g} at most"
    median = column.relative.value
    return told if median is None else f"{told}, median relative {median:.2g}"
