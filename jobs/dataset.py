"""The rows of a finished run, for Python: read as they are asked for, wherever the folder lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.kinds.chain import read_listing
from pipeline.access import granted

if TYPE_CHECKING:
    import pyarrow.dataset


def open_dataset(
    output: str, *, step: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> pyarrow.dataset.Dataset:
    """The rows of a finished run as an Arrow dataset: columns and rows are read when they are asked for.

    DuckDB and Polars take it as it is; ``to_table(columns=..., filter=...)`` gives a table. Failed rows are in it, with
    the reason in ``error``.

    Args:
        output: The folder of a run, or of a chain.
        step: Of a chain: which step's rows.
        storage_options: fsspec's, of the store that it lies on.

    Raises:
        OutputError: There is no run in the folder, or it is not finished.
        ValueError: `output` is a chain's and `step` names none of its steps, or it is no chain's.
    """
    import pyarrow.dataset

    from pipeline.output.dataset import SUCCESS, Output
    from pipeline.output.planfile import OutputError
    from pipeline.output.schema import decode_schema

    with granted(output, storage_options):
        run = Output.open(_of_step(output, step))
        if not run.folder.exists(SUCCESS):
            raise OutputError(f"{run.path}: the run is not finished; run the job again, it goes on where it was")
        files = [run.folder.path(run.part(shard)) for shard in range(int(run.plan["shards"]))]
        schema = decode_schema(run.plan["schema"])
        return pyarrow.dataset.dataset(files, schema=schema, format="parquet", filesystem=run.folder.fs)


def _of_step(output: str, step: str | None) -> str:
    steps = read_listing(output)
    if steps is None:
        if step is not None:
            raise ValueError(f"{output} is no chain's folder, so it has no step {step!r}; leave `step` out")
        return output
    places = {one["name"]: one["output"] for one in steps}
    if step not in places:
        asked = "is a chain's folder" if step is None else f"has no step {step!r}"
        raise ValueError(f"{output} {asked}; its steps: {', '.join(places)}. Say which: step={next(iter(places))!r}")
    return places[step]
