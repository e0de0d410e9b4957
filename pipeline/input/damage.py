"""Parts of an input file that cannot be read: their rows become failed rows, where it is known which rows they are."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

from pipeline.input.rows import LINE_IDS, Format, Raw, Span, Wanted, derived_id
from pipeline.input.source import Damaged, Source


def tolerant(format: Format) -> Format:
    """The format, but that damage in a file fails the rows from there on, if their ids follow from their numbers."""

    def rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
        at = span.start
        try:
            for raw in format.rows(source, span, wanted):
                yield raw
                at += 1
        except (Damaged, OSError) as error:
            broken = isinstance(error, Damaged) or error.errno == errno.EIO
            if not broken or source.id is not None or source.format not in LINE_IDS:
                raise
            why = unreadable(span.name, at, span.stop, error)
            yield from (Raw(derived_id(span.name, row), {}, why) for row in range(at, span.stop))

    return replace(format, rows=rows)


def unreadable(name: str, start: int, stop: int, error: BaseException) -> str:
    """Why rows fail, in a sentence."""
    rows = f"row {start}" if stop - start == 1 else f"rows {start} to {stop - 1}"
    return f"{rows} of {name} cannot be read, the file is damaged there: {' '.join(str(error).split())}"
