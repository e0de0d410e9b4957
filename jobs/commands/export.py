"""``latentmill export``: a finished output in the layout of another tool."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.commands.errors import errors, printable, stderr
from jobs.commands.single import single
from jobs.commands.stores import StorageOptions, reaching

To = StrEnum("To", ["webdataset", "imagefolder", "parquet", "npy", "safetensors"])


def export(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run, here or on a store.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A new folder, here or on a store.")],
    to: Annotated[
        To, typer.Option(metavar="LAYOUT", help=f"{', '.join(To)}; npy is clip-retrieval's layout of embeddings.")
    ],
    columns: Annotated[
        list[str] | None, typer.Option("--columns", metavar="NAME", help="Only this column; may be repeated.")
    ] = None,
    storage_options: StorageOptions = None,
) -> None:
    """Write the rows that are ok in the layout of another tool.

    Each once: tars, folders of pictures, embeddings, tensors; docs/leaving.md says what lies where.
    """
    with errors(), reaching(out, storage_options):
        from pipeline.output.export import export as exported

        single(out, "export")
        done = exported(out, dest, to.value, columns)  # type: ignore[arg-type]
    for note in done.notes:
        stderr().print(printable(note), markup=False, soft_wrap=True)
    left = f"; {done.others:,} that failed or are duplicates are left out" if done.others else ""
    typer.echo(f"{done.rows:,} rows in {dest}{left}")
