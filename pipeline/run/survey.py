"""Which rows form which shard: the files' scans are laid end to end and cut into shards of equal row count.

Memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pipeline.input.contents import Contents
from pipeline.input.files import InputFile, list_files
from pipeline.input.ids import Uniqueness, digest
from pipeline.input.rows import FileScan, Span
from pipeline.input.shards import Shard
from pipeline.input.source import Source, SourceError
from pipeline.input.walk import LeftOut
from pipeline.run.columns import Watched
from pipeline.run.scan import Scans, ScanTask, entered, one_by_one, scan_file


@dataclass
class Survey:
    """Running totals while the input is scanned."""

    rows: int = 0
    shards: int = 0
    files: int = 0
    bytes: int = 0
    content: str = ""
    notes: list[str] = field(default_factory=list)


def survey(
    source: Source, every: int, limit: int | None, totals: Survey, seen: Callable[[InputFile, FileScan], None],
    columns: Watched | None = None, scans: Scans = one_by_one, contents: Contents | None = None,
    ends: Sequence[int] = (),
) -> Iterator[Shard]:  # fmt: skip
    """Scan a resolved source and cut it into shards; ``totals``, ``seen``, ``columns`` and ``contents`` follow along.

    Args:
        scans: How files are scanned. With a limit they have to be scanned one by one.
        ends: Rows, ascending, behind which a shard ends however few it has: as far as earlier plans went.

    Raises:
        SourceError: A file cannot be read, or lacks a column; two rows share an id; there are no rows.
    """
    unique, content = Uniqueness(), hashlib.blake2b(digest_size=16)
    spans: list[Span] = []
    ids: list[str] = []
    held = 0
    aside = LeftOut()
    further = iter(ends)
    end = next(further, None)
    for found in scans(_tasks(source, limit, totals, columns, aside)):
        file, scan = found.file, found.scan
        if columns is not None:
            columns.join(found.kept)
            if scan.schema is not None:
                columns.file(file, scan.schema)
        rows = scan.rows if limit is None else min(scan.rows, limit - totals.rows)
        seen(file, scan)
        if contents is not None:
            contents.add(file, rows)
        totals.notes += scan.notes
        content.update(f"{file.name}\0{rows}\0{scan.digest}\n".encode())
        totals.files, totals.bytes = totals.files + 1, totals.bytes + file.size
        row_ids = None if found.ids is None else iter(found.ids)
        if row_ids is None:
            unique.add([file.name])  # stands for all of its rows
        at = 0
        while at < rows:
            take = min(every - held, rows - at)
            if end is not None:
                take = min(take, end - totals.rows)
            offset, ahead = entered(scan, at)
            spans.append(Span(file.name, file.path, at, at + take, offset, ahead))
            if row_ids is not None:
                fresh = list(islice(row_ids, take))
                unique.add(fresh)
                ids += fresh
            at, held = at + take, held + take
            totals.rows += take
            if held == every or totals.rows == end:
                yield Shard(totals.shards, tuple(spans), digest(ids) if ids else None)
                totals.shards += 1
                spans, ids, held = [], [], 0
            if totals.rows == end:
                end = next(further, None)
    if held:
        yield Shard(totals.shards, tuple(spans), digest(ids) if ids else None)
        totals.shards += 1
    if not totals.rows:
        raise SourceError(f"{', '.join(source.path)}: the input has no rows")
    if suspects := unique.suspects():
        _name_duplicates(source, limit, suspects)
    totals.content = content.hexdigest()
    totals.notes += aside.notes(contents is not None)
    totals.notes += columns.kept.notes() if columns is not None else []


def _tasks(
    source: Source, limit: int | None, totals: Survey, columns: Watched | None, aside: LeftOut
) -> Iterator[ScanTask]:
    """A task a file, until there are rows enough."""
    keep, reads = (None, None) if columns is None else (columns.keep, columns.reads)
    for file in list_files(source, aside):
        if limit is not None and totals.rows >= limit:
            return
        yield ScanTask(source, file, keep, reads, None if limit is None else limit - totals.rows)


def _name_duplicates(source: Source, limit: int | None, suspects: set[int]) -> None:
    """Read the ids again and name the first two rows that share one."""
    places: dict[str, str] = {}
    rows = 0
    for file in list_files(source):
        for row, own in enumerate(_ids(source, file)):
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


def _ids(source: Source, file: InputFile) -> Iterable[str]:
    """The ids that are unique in a file: of its rows, or its name, which stands for all of them."""
    ids = scan_file(ScanTask(source, file)).ids
    return ids if ids is not None else (file.name,)
