"""Which rows hold the same as an earlier one, found while the input is scanned: by digests of what the job reads."""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contract import Form
from pipeline.input.fetch import picture_bytes
from pipeline.input.files import InputFile
from pipeline.input.forms import FormError, as_picture, missing
from pipeline.input.read import reader_of
from pipeline.input.rows import Encoded, Raw, Span
from pipeline.input.source import Source
from pipeline.pictures import PictureError

HELD = 250_000
"""Rows in memory; what is known of more goes to temporary files."""
BUCKETS = 256
THREADS, AHEAD = 16, 64
"""Pictures are fetched by so many threads, so many rows ahead."""
_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])


class Contents:
    """Takes the rows of an input in their order, and says which of them hold what an earlier one holds.

    Two rows are the same if all is the same that the job reads of them: the bytes of their pictures, their texts. A
    job that does not say what it reads goes by the pictures, or where there are none by the whole row. What cannot be
    read, or is null, is the same as nothing else.

    Memory does not grow with the number of rows, but by 16 bytes a duplicate. Beyond `HELD` rows, 32 bytes a row and
    its id are kept in temporary files.

    Args:
        source: Resolved.
        reads: What the job takes of a row.
    """

    def __init__(self, source: Source, reads: Mapping[str, Form] | None, held: int = HELD) -> None:
        self._source, self._reads = source, reads
        self._seen = Seen(held)
        self._threads = ThreadPoolExecutor(THREADS, "latentmill-digest")
        self._under_way: deque[tuple[str, Future[bytes]]] = deque()

    def add(self, file: InputFile, rows: int) -> None:
        """The first rows of the next file."""
        span = Span(file.name, file.path, 0, rows)
        folder = file.path.rpartition("/")[0]
        for raw in islice(reader_of(self._source).rows(self._source, span, self._wanted()), rows):
            self._under_way.append((raw.id, self._threads.submit(self._digest, raw, folder)))
            self._settle(AHEAD)

    def twins(self) -> Iterator[tuple[int, str]]:
        """The duplicates in the input's order: number of the row, and the id of the first that holds the same."""
        self._settle(0)
        self._threads.shutdown()
        yield from self._seen.again()

    def _settle(self, left: int) -> None:
        while len(self._under_way) > left:
            own, digest = self._under_way.popleft()
            self._seen.add(digest.result(), own)

    def _wanted(self) -> dict[str, str] | None:
        """What has to be read of each row."""
        if self._source.columns:
            return dict(self._source.columns)
        return None if self._reads is None else {name: name for name in self._reads}

    def _digest(self, raw: Raw, folder: str) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        found = False
        if raw.error is None and raw.twin is None:
            for name, value in self._compared(raw):
                try:
                    data = self._bytes(name, value, folder)
                except (FormError, PictureError):  # its row fails when it is its turn
                    found = False
                    break
                found = found or not (missing(value) or name in self._source.variants)
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.digest() if found else hashlib.blake2b(b"alone\0" + _plain(raw.id), digest_size=16).digest()

    def _compared(self, raw: Raw) -> list[tuple[str, Any]]:
        names = [name for name in raw.values if not self._source.columns or name in self._source.columns]
        if self._reads is not None:
            names = [name for name in names if name in self._reads]
        elif pictures := [name for name in names if self._pictured(name, raw.values[name])]:
            names = pictures
        both = dict.fromkeys((*names, *self._source.variants))
        return [(name, raw.values.get(name)) for name in sorted(both)]

    def _pictured(self, name: str, value: Any) -> bool:
        return isinstance(value, Encoded) or name in self._source.images

    def _bytes(self, name: str, value: Any, folder: str) -> bytes:
        if missing(value):
            return b""
        if self._pictured(name, value) or (self._reads or {}).get(name) == "picture":
            # A copy: the row keeps no bytes while it waits for its turn.
            return picture_bytes(replace(as_picture(value)), self._source, folder)
        return _plain(value)


def _plain(value: Any) -> bytes:
    """A value that is no picture, as bytes."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    return value if isinstance(value, bytes) else f"{type(value).__name__} {value}".encode(errors="surrogatepass")


class Seen:
    """Digests and ids in the order of their rows; beyond ``held`` rows on disk, digests by their top bits."""

    def __init__(self, held: int) -> None:
        self._held, self._flushed = held, 0
        self._digests, self._ids = bytearray(), list[str]()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, digest: bytes, own: str) -> None:
        self._digests += digest
        self._ids.append(own)
        if len(self._ids) >= self._held:
            self._spill()

    def again(self) -> Iterator[tuple[int, str]]:
        """Rows whose digest an earlier row has: (row, that row's id), in their order."""
        if self._folder is None:
            yield from ((int(row), self._ids[first]) for row, first in _repeated(self._block()))
            return
        self._spill()
        with self._folder as name:
            blocks = (np.fromfile(path, _ROW) for path in sorted(Path(name).glob("bucket-*")))
            pairs = np.concatenate([_repeated(block) for block in blocks])
            ends = np.memmap(Path(name) / "ends", "<u8", "r")
            with open(Path(name) / "ids", "rb") as ids:
                for row, first in pairs[np.argsort(pairs[:, 0])]:
                    begin = int(ends[first - 1]) if first else 0
                    ids.seek(begin)
                    yield int(row), ids.read(int(ends[first]) - begin).decode(errors="surrogatepass")

    def _block(self) -> np.ndarray:
        block = np.empty(len(self._ids), _ROW)
        halves = np.frombuffer(bytes(self._digests), "<u8").reshape(-1, 2)
        block["high"], block["low"] = halves[:, 0], halves[:, 1]
        block["row"] = np.arange(self._flushed, self._flushed + len(self._ids))
        return block

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="latentmill-contents-")
        folder, block = Path(self._folder.name), self._block()
        buckets = block["high"] >> np.uint64(56)
        order = np.argsort(buckets, kind="stable")
        edges = np.searchsorted(buckets[order], np.arange(1, BUCKETS, dtype=np.uint64))
        for bucket, part in enumerate(np.split(block[order], edges)):
            with open(folder / f"bucket-{bucket:03d}", "ab") as handle:
                part.tofile(handle)
        with open(folder / "ids", "ab") as handle:
            begin = handle.tell()
            texts = [own.encode(errors="surrogatepass") for own in self._ids]
            handle.write(b"".join(texts))
        with open(folder / "ends", "ab") as handle:
            (begin + np.cumsum([len(text) for text in texts], dtype="<u8")).astype("<u8").tofile(handle)
        self._flushed += len(self._ids)
        self._digests, self._ids = bytearray(), []


def _repeated(block: np.ndarray) -> np.ndarray:
    """(row, first row) of every row that is not the first with its digest."""
    block = block[np.lexsort((block["row"], block["low"], block["high"]))]
    new = np.ones(len(block), bool)
    new[1:] = (block["high"][1:] != block["high"][:-1]) | (block["low"][1:] != block["low"][:-1])
    first = block["row"][np.maximum.accumulate(np.where(new, np.arange(len(block)), 0))] if len(block) else block["row"]
    pairs = np.stack([block["row"], first], axis=1)[~new].astype(np.int64)
    return pairs[np.argsort(pairs[:, 0])]
