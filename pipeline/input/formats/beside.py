"""What lies beside a tar and tells of it: an index of its members (``.idx``) and img2dataset's Parquet. Neither is
believed unseen: one that does not fit its tar is refused by name."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from pipeline.input.files import InputFile
from pipeline.input.source import Source, SourceError
from pipeline.input.streams import codec_of, open_input
from pipeline.storage import patiently

BLOCK = tarfile.BLOCKSIZE
LOOKED_AT = 16
"""Headers of a tar that are compared with its index, spread over it; each is a request on a store."""
LONGEST_PLAIN_NAME = 100
"""Longer names, and those that are not ASCII, stand in headers of their own, which an entry into the tar may miss."""
EXTENDED = 2 * BLOCK
"""What pax puts before a member that has no long name: a header and a block, for a time stamp with a fraction."""
LONGEST_INDEX = 1 << 28
WITH_NAMES = "v1.2"
NOT_THERE = (FileNotFoundError, PermissionError)
"""The second is what S3 says of an object that is not there to those who may not list its bucket."""
DONE = "success"
"""What img2dataset calls a picture that it has put into the tar."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, where its content begins, and its bytes."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


def members(source: Source, file: InputFile) -> list[Member] | None:
    """The members of a tar by the index beside it (``a.tar``: ``a.idx``), as DALI's ``wds2idx`` writes it.

    None where there is no index, or none that tells enough: without names (before v1.2), of a compressed tar, of one
    with links, hidden files or long names. Such a tar is scanned.

    Raises:
        SourceError: The index is damaged, or is that of another tar.
    """
    if codec_of(file.path) is not None or _far(file.path):
        return None
    path = f"{_stem(file.path)}.idx"
    text = _read(source, path)
    if text is None:
        return None
    found = _parsed(path, text)
    if found is None or not _is_tight(found):
        return None
    with open_input(file.path, source, 4 * BLOCK) as handle:
        if not _fits(found, handle, file.size):
            raise SourceError(f"{path}: is not the index of {file.path}; make it anew (wds2idx), or delete it")
    return found


def _far(path: str) -> bool:
    """Web servers may answer with a page where there is nothing."""
    return path.startswith(("http://", "https://"))


def _stem(path: str) -> str:
    """``folder/a.b.tar`` -> ``folder/a``: as both tools name what they put beside a tar."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _read(source: Source, path: str) -> bytes | None:
    try:
        with open_input(path, source) as handle:
            return patiently(lambda: handle.read(LONGEST_INDEX))
    except NOT_THERE:
        return None


def _parsed(path: str, text: bytes) -> list[Member] | None:
    """The members that an index lists; None if it lists no names."""
    lines = text.decode("ascii", errors="replace").splitlines()
    head = lines[0].split() if lines else []
    if not head or head[0] != WITH_NAMES:
        return None
    if len(head) != 2 or not head[1].isdecimal() or int(head[1]) != len(lines) - 1 or not text.endswith(b"\n"):
        raise SourceError(f"{path}: is cut or damaged ({len(lines) - 1} samples); make it anew (wds2idx), or delete it")
    found = []
    for line in lines[1:]:
        words = line.split(" ")
        if len(words) % 4:
            return None
        for _, offset, size, name in zip(*(words[part::4] for part in range(4)), strict=True):
            if not (offset.isdecimal() and size.isdecimal()):
                return None
            found.append(Member(name, int(offset), int(size)))
    return found


def _is_tight(found: Sequence[Member]) -> bool:
    """Whether nothing that a scan would tell of can lie between the members, and their names stand in their headers."""
    at = 0
    for member in found:
        if member.offset - BLOCK - at not in (0, EXTENDED):
            return False
        if len(member.name) > LONGEST_PLAIN_NAME or not member.name.isascii() or "\ufffd" in member.name:
            return False
        at = member.end
    return bool(found)


def _fits(found: Sequence[Member], handle: IO[bytes], size: int) -> bool:
    """Whether members stand where they should, and the tar ends behind the last one."""
    end = found[-1].end
    if end > size:
        return False
    step = max(1, (len(found) - 1) // (LOOKED_AT - 2))
    for member in [*found[::step], found[-1]]:
        handle.seek(member.offset - BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(patiently(lambda: handle.read(BLOCK)), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        if (header.name, header.size, header.isreg()) != (member.name, member.size, True):
            return False
    handle.seek(end)
    return not patiently(lambda: handle.read(EXTENDED)).strip(b"\0")


def check_downloads(source: Source, file: InputFile, keys: Sequence[str]) -> None:
    """Compare the samples of a tar with what img2dataset's Parquet beside it says it has put there.

    A Parquet file without its columns ``key`` and ``status`` is another's, and says nothing.

    Args:
        keys: Of the tar's samples.

    Raises:
        SourceError: They are others.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _far(file.path):
        return
    path = f"{_stem(file.path)}.parquet"
    try:
        with open_input(path, source) as handle:
            table = pq.ParquetFile(handle)
            if not {"key", "status"} <= set(table.schema_arrow.names):
                return
            said = table.read(["key", "status"]).to_pydict()
    except NOT_THERE:
        return
    except pa.ArrowException as error:
        raise SourceError(f"{path}: is no Parquet file ({error}); fetch it again, or move it away") from None
    listed = {str(key) for key, status in zip(said["key"], said["status"], strict=True) if status == DONE}
    there = set(keys)
    if listed != there:
        example = min(listed - there or there - listed)
        raise SourceError(
            f"{path}: lists {len(listed):,} pictures as downloaded, {file.path} holds {len(there):,} (as to "
            f"{example!r} they differ); one of the two is not the other's: fetch them again, or move the Parquet away"
        )
