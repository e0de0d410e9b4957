"""Read Parquet files: natively from a disk, and on the caller's thread through a Python file.

Given a Python file, Arrow's own threads may still be letting go of it while the interpreter ends, which aborts the
process (``terminate called without an active exception``; 3 of 60 that did `pq.read_table(handle)`, pyarrow 26).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Folder

BATCH_ROWS = 4096


def handle(folder: Folder, name: str) -> Any:
    """A file of a folder as Arrow reads it best; a context manager."""
    return pa.OSFile(os.fsencode(folder.path(name))) if folder.local else folder.open(name)


@contextmanager
def opened(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a folder, for its footer and row groups.

    Raises:
        FileNotFoundError, OSError: It cannot be opened.
        pyarrow.ArrowInvalid: It is none.
    """
    with handle(folder, name) as file:
        yield pq.ParquetFile(file)


def read(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole file, or some of its columns, as a table.

    Raises:
        FileNotFoundError, OSError: It cannot be read.
        pyarrow.ArrowInvalid: It is damaged.
    """
    with opened(folder, name) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=folder.local)


def batches(folder: Folder, name: str) -> Iterator[pa.RecordBatch]:
    """A file in batches of a few thousand rows."""
    with opened(folder, name) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=folder.local)


def rows(end: bytes) -> int | None:
    """Number of rows by a file's last bytes; None if its footer is longer than they are.

    Raises:
        pyarrow.ArrowInvalid: It is no Parquet file.
    """
    footer = int.from_bytes(end[-8:-4], "little") + 8
    return pq.read_metadata(pa.BufferReader(end)).num_rows if footer <= len(end) else None
