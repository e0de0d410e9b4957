"""Which rows form which shard: the input is scanned once, as a stream, and cut into shards of equal row count.

Memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from pipeline.input.files import InputFile, list_files
from pipeline.input.ids import Uniqueness, digest
from pipeline.input.read import reader_of
from pipeline.input.rows import FileScan, Span
from pipeline.input.shards import Shard
from pipeline.input.source import Source, SourceError
from pipeline.input.walk import LeftOut
from pipeline.run.columns import Watched


@dataclass
class Survey:
    """Running totals while the input is scanned."""

    rows: int = 0
    shards: int = 0
    files: int = 0
    bytes: int = 0
    content: str = ""
    notes: list[str] = field(default_factory=list)


def _file_ids(source: Source, file: InputFile, scan: FileScan | None) -> Iterator[str]:
    """Ids that have to be checked: the user's, or natural keys; else the file's name stands for all of its rows."""
    if source.id is not None:
        span = Span(file.name, file.path, 0, 1 << 62)
        yield from (raw.id for raw in reader_of(source).rows(source, span, {}))
        return
    keys = scan.keys if scan is not None else reader_of(source).scan(source, file, lambda row: False).keys
    yield from keys if keys is not None else (file.name,)


def survey(
    source: Source, every: int, limit: int | None, totals: Survey, seen: Callable[[InputFile, FileScan], None],
    columns: Watched | None = None,
) -> Iterator[Shard]:  # fmt: skip
    """Scan a resolved source and cut it into shards; ``totals``, ``seen`` and ``columns`` follow along.

    Raises:
        SourceError: A file cannot be read, or lacks a column; two rows share an id; there are no rows.
    """
    unique, content = Uniqueness(), hashlib.blake2b(digest_size=16)
    spans: list[Span] = []
    ids: list[str] = []
    held = 0
    own_ids = source.id is not None
    aside = LeftOut()
    for file in list_files(source, aside):
        if limit is not None and totals.rows >= limit:
            break
        begun = totals.rows
        begins = partial(_begins, begun, every)
        left = None if limit is None else limit - begun
        shown = columns.look(left) if columns is not None else None
        scan = reader_of(source).scan(source, file, begins, shown)
        if columns is not None and scan.schema is not None:
            columns.file(file, scan.schema)
        rows = scan.rows if left is None else min(scan.rows, left)
        seen(file, scan)
        totals.notes += scan.notes
        content.update(f"{file.name}\0{rows}\0{scan.digest}\n".encode())
        totals.files, totals.bytes = totals.files + 1, totals.bytes + file.size
        checked = _file_ids(source, file, scan)
        row_ids = own_ids or scan.keys is not None
        if not row_ids:
            unique.add(list(checked))
        at = 0
        while at < rows:
            take = min(every - held, rows - at)
            spans.append(Span(file.name, file.path, at, at + take, scan.offsets.get(at, 0)))
            if row_ids:
                fresh = list(islice(checked, take))
                unique.add(fresh)
                ids += fresh
            at, held = at + take, held + take
            totals.rows += take
            if held == every:
                yield Shard(totals.shards, tuple(spans), digest(ids) if ids else None)
                totals.shards += 1
                spans, ids, held = [], [], 0
    if held:
        yield Shard(totals.shards, tuple(spans), digest(ids) if ids else None)
        totals.shards += 1
    if not totals.rows:
        raise SourceError(f"{', '.join(source.path)}: the input has no rows")
    if suspects := unique.suspects():
        _name_duplicates(source, limit, suspects)
    totals.content = content.hexdigest()
    totals.notes += aside.notes()
    totals.notes += columns.kept.notes() if columns is not None else []


def _begins(begun: int, every: int, row: int) -> bool:
    """Whether a shard of ``every`` rows begins at a row of a file whose first one is row ``begun`` of the input."""
    return (begun + row) % every == 0


def _name_duplicates(source: Source, limit: int | None, suspects: set[int]) -> None:
    """Read the ids again and name the first two rows that share one."""
    places: dict[str, str] = {}
    rows = 0
    for file in list_files(source):
        for row, own in enumerate(_file_ids(source, file, None)):
            if limit is not None and rows >= limit:
                return
            rows += 1
            if int(Uniqueness.hashes([own], 1)[0]) not in suspects:
                continue
            place = f"row {row} of {file.path}"
            if own in places:
                advice = "give every row its own id" if source.id is not None else "name every file once"
                raise SourceError(f"two rows share the id {own!r}: {places[own]} and {place}; {advice}")
            places[own] = place
