"""Files as streams of bytes: opened wherever they are, decompressed by their name, refused if cut or no text."""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import fsspec

from pipeline.access import connect, fitting
from pipeline.failures import passing
from pipeline.input.source import Damaged, Source, SourceError
from pipeline.storage import patiently

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""How the names of compressed files end."""
_STARTS = {
    b"\x1f\x8b": "compressed by gzip (.gz)",
    b"BZh91AY&SY": "compressed by bzip2 (.bz2)",
    b"\xfd7zXZ\0": "compressed by xz (.xz)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (.zst)",
    b"\x04\x22\x4d\x18": "compressed by lz4; decompress it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1\x15": "a Parquet file (.parquet)",
    b"\x89PNG\r\n": "a picture",
    b"\xff\xd8\xff": "a picture",
}  # fmt: skip


def codec_of(path: str) -> str | None:
    """By what a file of this name is compressed."""
    return next((codec for suffix, codec in COMPRESSED.items() if path.lower().endswith(suffix)), None)


def open_input(path: str, source: Source, ahead: int | None = None) -> IO[bytes]:
    """Open an input file for reading, decompressed if its name says that it is compressed.

    Args:
        ahead: Bytes that are fetched from a store at once; None: as many as its client likes.
    """
    codec = codec_of(path)
    if "://" not in path and codec is None:
        return open(path, "rb")
    if codec is None and ahead is not None:
        filesystem, name = connect(source.whole(path), source.storage_options)
        return patiently(lambda: filesystem.open(name, "rb", block_size=ahead))
    told = None if codec == "zstd" else codec

    def opened() -> IO[bytes]:
        whole = source.whole(path)
        file = fsspec.open(whole, "rb", compression=told, **fitting(whole, source.storage_options))
        return patiently(file.open)

    return io.BufferedReader(_Zstd(opened)) if codec == "zstd" else opened()


class _Zstd(io.RawIOBase):
    """A zstd stream by Arrow's decoder, which everyone who has Parquet has. Seeking back starts over."""

    def __init__(self, opened: Callable[[], IO[bytes]]) -> None:
        self._opened, self._at = opened, 0
        self._stream = self._begin()

    def _begin(self) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(self._opened(), mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        count = int(self._stream.readinto(buffer))
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a zstd stream is not known before it is read")
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if target < self._at:
            self._stream.close()
            self._stream, self._at = self._begin(), 0
        while self._at < target and self.readinto(bytearray(min(1 << 20, target - self._at))):
            pass
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class AsItComes(io.RawIOBase):
    """A stream that hands on what its decompressor has, before it goes on and may find the file damaged."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        found = self._stream.read1(len(view))
        view[: len(found)] = found
        return len(found)


@contextmanager
def decompressing(path: str) -> Iterator[None]:
    """A compressed file that is cut or damaged is told of by name.

    Raises:
        Damaged: It is.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Damaged(_cut(path, error)) from None
    except OSError as error:
        told = error.errno is None and not passing(error)  # as gzip, bz2 and zstd tell of damage
        if told and codec_of(path) is not None:
            raise Damaged(_cut(path, error)) from None
        raise


def _cut(path: str, error: Exception) -> str:
    return f"{path}: is cut short or damaged ({error}); fetch it again or leave it out"


def check_text(path: str, start: bytes) -> None:
    """Refuse what is no text in an encoding whose lines end where ours do, by its first bytes.

    Raises:
        SourceError: It is UTF-16, compressed under another name, or a picture.
    """
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(f"{path}: is UTF-16; convert it to UTF-8 first")
    for mark, kind in _STARTS.items():
        if start.startswith(mark):
            raise SourceError(f"{path}: holds no text, it is {kind}; give it a name that says so, or set format")
