"""WebDataset tars: a row for each run of members with the same key. Nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from pipeline.input.files import SUFFIXES, InputFile, printable
from pipeline.input.rows import Begins, Encoded, FileScan, Format, Raw, Span, Wanted, open_input, own_id, picked, untold
from pipeline.input.source import Source, SourceError


def _split_key(member: str) -> tuple[str, str]:
    """``a/b.seg.png`` -> (``a/b``, ``seg.png``): the key ends at the first dot of the last part."""
    folder, slash, base = printable(member).rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, int, list[tarfile.TarInfo]]]:
    """Runs of members with the same key: key, offset of the first header, members. Nothing is ever unpacked to disk."""
    key, start, members = "", 0, list[tarfile.TarInfo]()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else a big tar's headers pile up
        if not member.isfile():
            continue
        found, extension = _split_key(member.name)
        if not extension:
            continue
        if members and found != key:
            yield key, start, members
            members = []
        if not members:
            key, start = found, member.offset
        members.append(member)
    if members:
        yield key, start, members


def _open_tar(source: Source, path: str, offset: int) -> tuple[tarfile.TarFile, IO[bytes]]:
    handle = open_input(path, source)
    handle.seek(offset)
    try:
        return tarfile.open(fileobj=handle, mode="r:gz" if path.endswith(".tgz") else "r:"), handle
    except tarfile.TarError as error:
        handle.close()
        raise SourceError(f"{path}: is no readable tar ({error})") from None


def _webdataset_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    tar, handle = _open_tar(source, file.path, 0)
    digest, offsets, keys = hashlib.blake2b(digest_size=16), {}, list[str]()
    with handle, tar:
        try:
            for key, start, members in _groups(tar):
                if begins(len(keys)):
                    offsets[len(keys)] = start
                keys.append(f"{file.name}/{key}")
                for member in members:
                    digest.update(f"{member.name}\0{member.size}\0{member.mtime}\n".encode(errors="surrogateescape"))
        except (tarfile.TarError, EOFError, OSError) as error:
            last = f" after {keys[-1]}" if keys else ""
            problem = f"{file.path}: the tar is damaged{last} ({error}); fetch it again or leave it out"
            raise SourceError(problem) from None
    return FileScan(len(keys), digest.hexdigest(), offsets, tuple(keys))


def _webdataset_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    tar, handle = _open_tar(source, span.path, span.offset)
    with handle, tar:
        for row, (key, _, members) in enumerate(span.of(_groups(tar)), span.start):
            derived = f"{span.name}/{key}"
            values: dict[str, Any] = {"__key__": key}
            problem = None
            for member in members:
                extension = _split_key(member.name)[1]
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                try:
                    _member(values, extension, data)
                except ValueError as error:
                    problem = problem or f"{member.name} in {span.name}: {error}"
            own = derived if source.id is None else own_id(source, values, span, row)
            yield Raw(own, picked(values, wanted), problem)


def _member(values: dict[str, Any], extension: str, data: bytes) -> None:
    """Add a tar member's content under its extension, and under ``image``, ``text`` or its own keys."""
    last = extension.rpartition(".")[2]
    if "." + last in SUFFIXES["images"]:
        values[extension] = Encoded(data)
        values.setdefault("image", values[extension])
    elif last in ("txt", "text", "caption", "cls"):
        values[extension] = data.decode()
        if last != "cls":
            values.setdefault("text", values[extension])
    elif last == "json":
        content = json.loads(data)
        values[extension] = content
        for name, value in content.items() if isinstance(content, dict) else ():
            values.setdefault(name, value)
    elif last == "npy":
        values[extension] = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        values[extension] = data


WEBDATASET = Format(_webdataset_scan, _webdataset_rows, untold)
