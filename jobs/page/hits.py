"""Rows of a reference by their numbers, with what a reader wants to see of them: kept columns, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from index.reference import Reference
    from pipeline.input.rows import Span
    from pipeline.output.dataset import Output

NOT_SHOWN = ("id", "embedding", "norm", "status", "error", "duplicate_of")


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: Its id.
        cosine: To the query.
        columns: Its kept columns, without pictures and vectors.
        picture: From its kept columns, or read again from the job's input; None where there is none any more.
    """

    id: str
    cosine: float
    columns: dict[str, Any]
    picture: Image | bytes | None


def hits(output: Output, reference: Reference, positions_K: np.ndarray, cos_K: Sequence[float]) -> list[Hit]:
    """Rows by their numbers in the reference, with their columns and pictures."""
    from pipeline.output import parquet

    places = reference.table.take(positions_K).to_pylist()
    wanted: dict[int, list[int]] = {}
    for place in places:
        wanted.setdefault(place["part"], []).append(place["row"])
    columns: dict[tuple[int, int], dict[str, Any]] = {}
    for record in output.records():
        if record.shard not in wanted:
            continue
        name = output.locate(record)
        if name is None:
            continue
        with parquet.opened(output.folder, name) as file:
            names = [column for column in file.schema_arrow.names if column not in NOT_SHOWN]
        if not names:
            continue
        rows = parquet.read(output.folder, name, names).take(wanted[record.shard])
        for row, plain in zip(wanted[record.shard], rows.to_pylist(), strict=True):
            columns[record.shard, row] = plain
    again = source_pictures(output, wanted)
    found = []
    for place, cosine in zip(places, cos_K, strict=True):
        at = (place["part"], place["row"])
        values = columns.get(at, {})
        kept = next((value["bytes"] for value in values.values() if _is_picture(value)), None)
        shown = {name: cell for name, cell in values.items() if not _is_picture(cell) and not isinstance(cell, list)}
        found.append(Hit(place["id"], float(cosine), shown, kept or again.get(at)))
    return found


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def _span_of(spans: Sequence[Span], row: int) -> Span:
    """The one row of a shard, as a span of its own file."""
    from pipeline.input.source import SourceError

    left = row
    for span in spans:
        if left < span.stop - span.start:
            return span.part(left, 1)
        left -= span.stop - span.start
    raise SourceError(f"the shard has no row {row}")


def source_pictures(
    output: Output, wanted: Mapping[int, Sequence[int]], fetch: bool = True
) -> dict[tuple[int, int], Image]:
    """Pictures of rows, read again from the job's input as far as it is still there.

    Args:
        wanted: Shard -> rows in it.
        fetch: Follow what the rows name where the job allowed it; else what lies in the input's own folders alone.
    """
    from pipeline.input.read import prepare, read_rows, wanted_columns
    from pipeline.input.source import Source, SourceError
    from pipeline.output.planfile import read_shards

    source = Source.from_json(output.plan["source"]).reachable()
    source = source if fetch else replace(source, allow=())
    found: dict[tuple[int, int], Image] = {}
    for shard in read_shards(output.own):
        for row in wanted.get(shard.index, ()):
            try:
                span = _span_of(shard.spans, row)
                raw = next(read_rows(source, (span,), 0, 1, wanted_columns(source, ())))
                read, _ = prepare(raw, source, span.path.rpartition("/")[0], {"image": "picture"})
            except (SourceError, OSError, StopIteration):
                continue
            if read is not None and read.get("image") is not None:
                found[shard.index, row] = read["image"]
    return found
