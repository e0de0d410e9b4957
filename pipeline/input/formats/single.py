"""A row that no file holds, ``one-row://name``: for jobs whose rows are variants of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.input.files import InputFile
from pipeline.input.rows import Begins, FileScan, Format, Look, Raw, Span, Wanted, fixed
from pipeline.input.source import Source


def _scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    return FileScan(1, f"one-row:{file.name}")


def _rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    if span.start < 1 <= span.stop:
        yield Raw(span.name, {})


ONE_ROW = Format(_scan, _rows, fixed())
