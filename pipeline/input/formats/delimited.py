"""CSV and TSV with a header; the delimiter is found from it. All columns are text."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.input.files import InputFile
from pipeline.input.formats.text import read_lines
from pipeline.input.rows import Begins, FileScan, Format, Look, Raw, Span, Wanted, is_text, own_id, picked
from pipeline.input.source import Source, SourceError

if TYPE_CHECKING:
    import pyarrow as pa

csv.field_size_limit(1 << 27)


def _decoded(line: bytes) -> str:
    return line.decode(errors="surrogateescape")


class _Counted:
    """Lines of a CSV file as text, counting the bytes handed out so far."""

    def __init__(self, lines: Iterator[bytes], position: int) -> None:
        self._lines, self.position = lines, position

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if not self.position and line.startswith(b"\xef\xbb\xbf"):
            self.position, line = 3, line[3:]
        self.position += len(line)
        return _decoded(line)


def _csv_header(source: Source, path: str) -> tuple[list[str], str, int]:
    """Column names, the delimiter, and the byte after the header."""
    lines = read_lines(source, path, 0)
    counted = _Counted(lines, 0)
    try:
        first = next(counted)
    except StopIteration:
        return [], ",", 0
    bare = re.sub(r'"[^"]*("|$)', "", first)  # a sign within quotes belongs to a name
    counts = {sign: bare.count(sign) for sign in ",;\t"}
    delimiter = max(counts, key=lambda sign: counts[sign]) if any(counts.values()) else ","
    counted = _Counted(read_lines(source, path, 0), 0)
    try:
        names = next(csv.reader(counted, delimiter=delimiter))
    except csv.Error as error:
        raise SourceError(f"{path}: its header cannot be read ({error}); save it with line ends of today") from None
    if not all(map(is_text, names)):
        raise SourceError(f"{path}: its header is not UTF-8; save it as UTF-8")
    return names, delimiter, counted.position


def _csv_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    names, delimiter, start = _csv_header(source, file.path)
    digest, offsets, rows = hashlib.blake2b(digest_size=16), {}, 0
    lines, last = list[bytes](), list[bytes]()

    def hashed() -> Iterator[bytes]:
        for line in read_lines(source, file.path, 0):
            digest.update(line)
            lines.append(line)
            yield line

    counted = _Counted(hashed(), 0)
    before = 0
    try:
        for cells in csv.reader(counted, delimiter=delimiter):
            if before >= start and cells:
                if begins(rows):
                    offsets[rows] = before
                rows += 1
            before = counted.position
            last, lines = lines, []
        _check_end(file.path, rows, last, delimiter)
    except csv.Error as error:
        raise SourceError(f"{file.path}, after row {rows}: {error}; is a quote left open?") from None
    return FileScan(rows, digest.hexdigest(), offsets, schema=_schema(names))


def _check_end(path: str, rows: int, last: list[bytes], delimiter: str) -> None:
    """Refuse a file that ends inside a quoted cell: its last row holds whatever came after the quote.

    Args:
        last: The lines of its last row.
    """
    try:
        for _ in csv.reader(map(_decoded, last), delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            where = f"row {rows - 1}, which begins with {_decoded(last[0])[:60].rstrip()!r}"
            problem = f"{path} ends inside quotes that are opened in {where}; close them, or fetch the file again"
            raise SourceError(problem) from None


def _csv_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    names, delimiter, start = _csv_header(source, span.path)
    counted = _Counted(read_lines(source, span.path, span.offset or start), span.offset or start)
    cells_of = (cells for cells in csv.reader(counted, delimiter=delimiter) if cells)
    for row, cells in enumerate(span.of(cells_of), span.start):
        problem = None
        if len(cells) != len(names):
            problem = f"row {row} of {span.name} has {len(cells)} cells, the header has {len(names)}"
        elif not all(cell.isprintable() or is_text(cell) for cell in cells):
            problem = f"row {row} of {span.name} is not UTF-8"
        values = dict(zip(names, cells, strict=False))
        if problem is None:
            yield Raw(own_id(source, values, span, row), picked(values, wanted))
        else:
            yield Raw(own_id(source, values, span, row), {}, problem)


def _csv_schema(source: Source, file: InputFile) -> pa.Schema:
    return _schema(_csv_header(source, file.path)[0])


def _schema(names: list[str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in names])


CSV = Format(_csv_scan, _csv_rows, _csv_schema)
