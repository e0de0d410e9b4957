"""Scanning the files of an input: what each holds, one after another here or many at once on a cluster.

A scan asks nothing of the files before it: it notes where every `MARK`-th row begins, and whoever cuts shards enters
at the mark before the row that it wants. So no file waits for another, and none has to pass through the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.contract import Form
from pipeline.input.files import InputFile, list_files
from pipeline.input.read import reader_of
from pipeline.input.rows import FileScan, Span
from pipeline.input.source import Source
from pipeline.output.kept import Settling
from pipeline.run.columns import Watched

MARK = 64
"""Rows from one noted offset to the next: a shard passes over fewer than these before its own."""
HEAVY_BYTES = 1 << 30
"""An input whose files are read whole to be planned, and that has more bytes than this, is scanned on the cluster."""
STREAMED = ("webdataset", "jsonl", "csv", "text")
"""Formats whose files have to be read from end to end to find their rows."""


@dataclass(frozen=True)
class ScanTask:
    """A file to scan.

    Attributes:
        keep, reads: As for `Watched`; keep is None where nobody watches the columns.
        most: Only so many of its rows have a say in the types of kept columns; None: all.
    """

    source: Source
    file: InputFile
    keep: Mapping[str, str] | None = None
    reads: Mapping[str, Form] | None = None
    most: int | None = None


@dataclass(frozen=True)
class Scanned:
    """What a scan found.

    Attributes:
        ids: The rows' ids where they come from the content (the user's column, or natural keys), in order.
        kept: What its rows say of the kept columns, where they have a say.
    """

    file: InputFile
    scan: FileScan
    ids: Iterable[str] | None = None
    kept: Settling | None = None


Scans = Callable[[Iterable[ScanTask]], Iterator[Scanned]]
"""Scans of files in their order; takes a task only when there is room for it."""


def is_mark(row: int) -> bool:
    return row % MARK == 0


def entered(scan: FileScan, row: int) -> tuple[int, int]:
    """(offset, rows to pass over from there) of a row of a scanned file; (0, 0) where it can be entered anywhere."""
    mark = row - row % MARK
    return (scan.offsets[mark], row - mark) if mark in scan.offsets else (0, 0)


def scan_file(task: ScanTask) -> Scanned:
    """Scan one file. The ids are read when they are asked for.

    Raises:
        SourceError: It cannot be read.
    """
    source, file = task.source, task.file
    watched = None if task.keep is None else Watched(source, task.keep, task.reads)
    look = None if watched is None else watched.look(task.most)
    scan = reader_of(source).scan(source, file, is_mark, look)
    return Scanned(file, scan, row_ids(source, file, scan.keys), None if watched is None else watched.kept)


def row_ids(source: Source, file: InputFile, keys: Iterable[str] | None) -> Iterable[str] | None:
    """The ids of a file's rows where they come from its content: the user's, else its natural keys."""
    if source.id is None:
        return keys
    return (raw.id for raw in reader_of(source).rows(source, Span(file.name, file.path, 0, 1 << 62), {}))


def one_by_one(tasks: Iterable[ScanTask]) -> Iterator[Scanned]:
    """In this process."""
    return map(scan_file, tasks)


@dataclass(frozen=True)
class _Packed:
    """Ids as they travel: a tenth of what Python's strings take."""

    ids: pa.Array

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.ids), 10_000):
            yield from self.ids[start : start + 10_000].to_pylist()


def scan_elsewhere(task: ScanTask) -> Scanned:
    """`scan_file` for another process: all is read there, and what comes back is small."""
    found = scan_file(task)
    ids = None if found.ids is None else _Packed(pa.array(found.ids, pa.large_string()))
    return replace(found, scan=replace(found.scan, keys=None), ids=ids)


def is_heavy(source: Source, limit: int | None) -> bool:
    """Whether scanning a resolved source is work for a cluster: several files, read whole, of many bytes."""
    if limit is not None or (source.format not in STREAMED and source.id is None):
        return False
    size = 0
    for number, file in enumerate(list_files(source)):
        size += file.size
        if number and size >= HEAVY_BYTES:
            return True
    return False
