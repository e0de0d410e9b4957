"""The rows of an output that failed, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output import parquet
from pipeline.output.dataset import Output
from pipeline.output.planfile import OutputError


@dataclass(frozen=True)
class FailedRow:
    """Its id, the number of its shard, and the reason."""

    id: str
    shard: int
    error: str


def failed_rows(output: Output) -> Iterator[FailedRow]:
    """Those of the committed shards, in the input's order; shards without any are not opened.

    Raises:
        OutputError: The file of a shard is gone or damaged.
    """
    listed = output.listings()
    for record in output.records(lambda name, error: None):
        if not record.rows_failed:
            continue
        name = output.locate(record, listed)
        if name is None:
            raise OutputError(f"{output.path}: the file of shard {record.shard} is gone or cut; run the job again")
        try:
            rows = parquet.read(output.folder, name, ["id", "status", "error"])
        except pa.ArrowInvalid as error:
            raise OutputError(f"{output.path}/{name} is damaged ({error}); delete it and run the job again") from None
        bad = rows.filter(pc.equal(rows["status"], "failed"))
        for own, reason in zip(bad["id"].to_pylist(), bad["error"].to_pylist(), strict=True):
            yield FailedRow(own, record.shard, reason or "")
