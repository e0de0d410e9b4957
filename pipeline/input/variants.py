"""One planned row for each value of a column: every row of the input, once a method.

Rows of the wrapped format are numbered so that row ``r`` of a file with V variants is its row ``r // V`` under variant
``r % V``. Planning, shards, splitting and resuming see nothing but more rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.input.rows import Raw
from pipeline.input.source import Source

if TYPE_CHECKING:
    from pipeline.input.files import InputFile
    from pipeline.input.rows import Begins, FileScan, Format, Look, Span, Wanted


def repeated(format: Format, name: str, values: tuple[str, ...]) -> Format:
    """The format with each row once for every value; ``name`` holds the value, ids end in ``/<value>``."""
    count = len(values)

    def scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
        shown = None if look is None else lambda row, found: look(row * count, found)
        found = format.scan(source, file, lambda row: any(begins(row * count + v) for v in range(count)), shown)
        offsets = {
            row * count + v: offset
            for row, offset in found.offsets.items()
            for v in range(count)
            if begins(row * count + v)
        }
        keys = None if found.keys is None else tuple(f"{key}/{value}" for key in found.keys for value in values)
        return replace(found, rows=found.rows * count, offsets=offsets, keys=keys)

    def rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
        first = span.start // count
        entered = (span.start - span.ahead) // count
        inner = replace(span, start=first, stop=-(-span.stop // count), ahead=first - entered)
        every = (
            Raw(
                f"{raw.id}/{value}",
                {**raw.values, name: value},
                raw.error,
                None if raw.twin is None else f"{raw.twin}/{value}",
            )
            for raw in format.rows(source, inner, wanted)
            for value in values
        )
        skip = span.start - first * count
        yield from islice(every, skip, skip + span.stop - span.start)

    return replace(format, scan=scan, rows=rows)
