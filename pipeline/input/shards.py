"""Shards: the units of work that an input is cut into, and the ids that belong to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.input.read import read_rows
from pipeline.input.rows import LINE_IDS, Span
from pipeline.input.source import Source


@dataclass(frozen=True)
class Shard:
    """A unit of work: some spans of files.

    Attributes:
        ids: Digest of its ids in order, if they come from the input's content; None: they follow from the spans.
        twins: Rows that hold what an earlier row of the input holds: place in the shard -> that row's id.
    """

    index: int
    spans: tuple[Span, ...]
    ids: str | None = None
    twins: Mapping[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


def expected_ids(source: Source, shard: Shard) -> list[str]:
    """The ids of a shard, read from the input (the user's ids) or made from its spans."""
    if shard.ids is None and source.id is None and not source.variants and source.format in LINE_IDS:
        return [f"{span.name}#{row}" for span in shard.spans for row in range(span.start, span.stop)]
    return [raw.id for raw in read_rows(source, shard.spans, 0, shard.rows, {})]
