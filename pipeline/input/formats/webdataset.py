"""WebDataset tars: a row for each run of members with the same key. Nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from pipeline.input.files import InputFile, printable
from pipeline.input.formats.arrays import read_header
from pipeline.input.formats.beside import Member, check_downloads, members
from pipeline.input.rows import (
    Begins,
    Encoded,
    FileScan,
    Format,
    Look,
    Raw,
    Span,
    Wanted,
    id_problem,
    own_id,
    picked,
    untold,
    valid_text,
)
from pipeline.input.source import SUFFIXES, Source, SourceError
from pipeline.input.streams import decompressing, open_input

LONGEST_MEMBER = 1 << 30
"""Bytes, after decompression. A member that is longer is not read, and fails its sample."""
LONGEST_NAME = 1 << 20
_NAMING = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
SCANNED_AHEAD = 2 << 20
"""Bytes that a scan fetches at once: what is longer is passed over, and fetching less would wait longer than it saves
(at 30 ms a request and 100 MB/s)."""
TEXTS = ("txt", "text", "caption")
"""Members whose content is the column ``text`` too."""
LISTED = "listed:"
"""How a digest begins that is of names and sizes alone, which is what an index tells."""
BEHIND_THE_END = 1 << 16
"""Bytes behind the end mark that are looked at: writers pad to 10 kB, so another tar would begin within these."""


@dataclass
class _Sample:
    """Members with the same key that stand one after the other: extension -> content (None: not read)."""

    key: str
    start: int
    members: list[tarfile.TarInfo] = field(default_factory=list)
    contents: dict[str, bytes | None] = field(default_factory=dict)
    twice: str | None = None
    long: str | None = None

    def add(self, member: tarfile.TarInfo, extension: str, content: bytes | None) -> None:
        if extension in self.contents:
            self.twice = self.twice or member.name
        self.members.append(member)
        self.contents.setdefault(extension, content)


def _split_key(member: str) -> tuple[str, str]:
    """``a/b.seg.png`` -> (``a/b``, ``seg.png``): the key ends at the first dot of the last part."""
    folder, slash, base = printable(member).rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _hidden(member: str) -> bool:
    """Members that carry nothing of their own: ``._000.jpg`` and ``__MACOSX/`` of macOS, ``.DS_Store``."""
    folder, _, base = member.rpartition("/")
    return base.startswith(".") or "__MACOSX" in folder.split("/")


def _samples(tar: _Tar, reads: Callable[[int, str], bool]) -> Iterator[_Sample]:
    """The tar's samples in order. Members are read as they are passed: a compressed tar cannot go back.

    Args:
        reads: Whether to read a member, by the sample's number from here on and the member's extension.
    """
    sample, number = None, -1
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else a big tar's headers pile up
        key, extension = _split_key(member.name)
        if not extension or _hidden(member.name):
            continue
        if not member.isfile():
            tar.links += member.issym() or member.islnk()
            continue
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample, number = _Sample(key, member.offset), number + 1
        content = None
        if member.size > LONGEST_MEMBER:
            sample.long = sample.long or member.name
        elif reads(number, extension):
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
        sample.add(member, extension, content)
    if sample is not None:
        yield sample


class _Member(tarfile.TarInfo):
    """A header that tells how the tar ends: `tarfile` takes a damaged or cut one for the end, without a word."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> _Member:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            tar.marked = False
            raise

    def _proc_member(self, tar: Any) -> Any:
        """Long names stand in a member of their own, which `tarfile` reads whole, whatever its length."""
        if self.type in _NAMING and self.size > LONGEST_NAME:
            raise tarfile.ReadError(f"the header of a member is {self.size:,} bytes long")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Tar(tarfile.TarFile):
    """Attributes: links: members left out because they only point at others; marked: whether an end mark was found."""

    tarinfo = _Member
    links = 0
    marked = True


@contextmanager
def _opened(source: Source, path: str, offset: int, ahead: int | None = None) -> Iterator[tuple[_Tar, IO[bytes]]]:
    """The tar from a member's header on, and the file under it.

    Raises:
        SourceError: It is none, or is found to be damaged in the course.
    """
    entered = False
    with open_input(path, source, ahead) as handle, decompressing(path):
        handle.seek(offset)
        try:
            with _Tar.open(fileobj=handle, mode="r:") as tar:
                assert isinstance(tar, _Tar)
                entered = True
                yield tar, handle
        except tarfile.TarError as error:
            problem = "is damaged; fetch it again or leave it out" if entered else "is no readable tar"
            raise SourceError(f"{path}: {problem} ({error})") from None


def _scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    """A tar's samples; by the index beside it where nobody looks at their contents, else by reading it through."""
    listed = None if look is not None else members(source, file)
    scan = _listed(file, listed, begins) if listed is not None else _read_through(source, file, begins, look)
    if scan.keys is not None:
        check_downloads(source, file, [key[len(file.name) + 1 :] for key in scan.keys])
    return scan


class _Found:
    """What a scan learns of a tar, sample by sample.

    Args:
        begins: Whether to note where a row begins.
    """

    def __init__(self, file: InputFile, begins: Begins) -> None:
        self._file, self._begins = file, begins
        self._seen, self.keys, self.offsets = set[str](), list[str](), dict[int, int]()
        self._whole, self._names = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)

    def sample(self, key: str, start: int) -> None:
        """The next one begins.

        Raises:
            SourceError: Its key has been there before.
        """
        if key in self._seen:
            raise SourceError(_apart(self._file.path, key))
        self._seen.add(key)
        if self._begins(len(self.keys)):
            self.offsets[len(self.keys)] = start
        self.keys.append(f"{self._file.name}/{key}")

    def member(self, name: str, size: int, mtime: float | None = None) -> None:
        """One of its members; an index tells no time."""
        told = f"{name}\0{size}\0"
        self._names.update(f"{told}\n".encode(errors="surrogateescape"))
        if mtime is not None:
            self._whole.update(f"{told}{mtime}\n".encode(errors="surrogateescape"))

    def scan(self, notes: tuple[str, ...], listed: bool) -> FileScan:
        names, whole = f"{LISTED}{self._names.hexdigest()}", self._whole.hexdigest()
        digest, also = (names, "") if listed else (whole, names)
        return FileScan(len(self.keys), digest, self.offsets, tuple(self.keys), notes=notes, also=also)


def _listed(file: InputFile, listed: Sequence[Member], begins: Begins) -> FileScan:
    """By an index that fits."""
    found, last = _Found(file, begins), None
    for member in listed:
        key, extension = _split_key(member.name)
        if not extension or _hidden(member.name):
            continue
        if key != last:
            found.sample(key, member.offset - tarfile.BLOCKSIZE)
        last = key
        found.member(member.name, member.size)
    cut = (_unmarked(file.path, len(found.keys)),) if file.size < listed[-1].end + tarfile.BLOCKSIZE else ()
    return found.scan(cut, listed=True)


def _read_through(source: Source, file: InputFile, begins: Begins, look: Look | None) -> FileScan:
    found = _Found(file, begins)

    def reads(number: int, extension: str) -> bool:
        return look is not None and extension.rpartition(".")[2] in (*TEXTS, "cls", "json", "npy")

    with _opened(source, file.path, 0, SCANNED_AHEAD) as (tar, handle):
        try:
            for row, sample in enumerate(_samples(tar, reads)):
                found.sample(sample.key, sample.start)
                if look is not None:
                    look(row, _values(sample, file.name)[0])
                for member in sample.members:
                    found.member(member.name, member.size, member.mtime)
        except (tarfile.TarError, EOFError) as error:
            last = f" after {found.keys[-1]}" if found.keys else ""
            problem = f"{file.path}: the tar is damaged{last} ({error}); fetch it again or leave it out"
            raise SourceError(problem) from None
        if tar.marked and handle.read(BEHIND_THE_END).strip(b"\0"):
            raise SourceError(
                f"{file.path}: holds more behind the end mark of its tar, after "
                f"{found.keys[-1] if found.keys else 'no member'}; were tars appended to each other? Give each a file "
                "of its own"
            )
        notes = _notes(file.path, tar, len(found.keys))
    return found.scan(notes, listed=False)


def _apart(path: str, key: str) -> str:
    return (
        f"{path}: the members of the sample {key!r} do not stand together, or are there twice; a sample is one run of "
        "members with the same key. Pack it again in order (tar --sort=name)"
    )


def _unmarked(path: str, rows: int) -> str:
    return f"{path}: the tar has no end mark and may be cut; {rows:,} samples are there"


def _notes(path: str, tar: _Tar, rows: int) -> tuple[str, ...]:
    notes = []
    if not tar.marked:
        notes.append(_unmarked(path, rows))
    if tar.links:
        advice = "pack the files themselves (tar --dereference --hard-dereference)"
        notes.append(f"{path}: {tar.links:,} links are left out; {advice}")
    return tuple(notes)


def _rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    last = span.ahead + span.stop - span.start
    with _opened(source, span.path, span.offset) as (tar, _):
        samples = _samples(tar, lambda number, extension: span.ahead <= number < last)
        for row, sample in enumerate(span.of(samples), span.start):
            values, problem = _values(sample, span.name)
            own = valid_text(f"{span.name}/{sample.key}") if source.id is None else own_id(source, values, span, row)
            yield Raw(own, picked(values, wanted), problem or id_problem(source, values))


def _values(sample: _Sample, place: str) -> tuple[dict[str, Any], str | None]:
    """Contents under their extensions, under ``image`` and ``text``, and a JSON member's keys; and what is wrong.

    A member always goes before a JSON key of the same name, whatever their order.
    """
    values: dict[str, Any] = {"__key__": sample.key}
    problem = f"{sample.twice} in {place}: the sample has two members of that kind" if sample.twice else None
    if sample.long:
        problem = f"{sample.long} in {place}: is longer than {LONGEST_MEMBER:,} bytes"
    described: list[dict[str, Any]] = []
    for extension, content in sample.contents.items():
        try:
            values[extension] = _member(extension, content)
        except (ValueError, RecursionError, MemoryError) as error:
            problem = problem or f"{sample.key}.{extension} in {place}: {error}"
            continue
        last = extension.rpartition(".")[2]
        if _is_picture(extension):
            values.setdefault("image", values[extension])
        elif last in TEXTS:
            values.setdefault("text", values[extension])
        elif last == "json" and isinstance(values[extension], dict):
            described.append(values[extension])
    for keys in described:
        for name, value in keys.items():
            values.setdefault(name, value)
    return values, problem


def _is_picture(extension: str) -> bool:
    return f".{extension}".endswith(SUFFIXES["images"])


def _member(extension: str, content: bytes | None) -> Any:
    """What a member holds, by its extension; something of the same type where it was not read.

    Raises:
        ValueError: It does not hold that.
    """
    last = extension.rpartition(".")[2]
    if _is_picture(extension):
        return Encoded(content)
    if content is None:
        return b""
    if last in (*TEXTS, "cls"):
        return content.decode("utf-8-sig")
    if last == "json":
        return json.loads(content)
    if last == "npy":
        return _array(content)
    return content


def _array(content: bytes) -> np.ndarray:
    """
    Raises:
        ValueError: It is no array of numpy's, or promises more than it holds.
    """
    file = io.BytesIO(content)
    try:
        shape, _, dtype = read_header(file)
        if len(content) - file.tell() < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its header promises {shape} of {dtype}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        raise ValueError(f"is no .npy file of {len(content):,} bytes: {error}") from None


WEBDATASET = Format(_scan, _rows, untold)
