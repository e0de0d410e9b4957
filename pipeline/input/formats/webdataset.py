"""WebDataset tars: a row for each run of members with the same key. Nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from pipeline.input.files import InputFile, printable
from pipeline.input.rows import (
    Begins,
    Encoded,
    FileScan,
    Format,
    Look,
    Raw,
    Span,
    Wanted,
    open_input,
    own_id,
    picked,
    untold,
)  # fmt: skip
from pipeline.input.source import SUFFIXES, Source, SourceError


def _split_key(member: str) -> tuple[str, str]:
    """``a/b.seg.png`` -> (``a/b``, ``seg.png``): the key ends at the first dot of the last part."""
    folder, slash, base = printable(member).rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, int, list[tarfile.TarInfo]]]:
    """Runs of members with the same key: key, offset of the first header, members."""
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


@contextmanager
def _opened(source: Source, path: str, offset: int) -> Iterator[tarfile.TarFile]:
    """The tar from a member's header on."""
    with open_input(path, source) as handle:
        handle.seek(offset)
        with _tar(handle, path) as tar:
            yield tar


def _tar(handle: IO[bytes], path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=handle, mode="r:gz" if path.endswith(".tgz") else "r:")
    except tarfile.TarError as error:
        raise SourceError(f"{path}: is no readable tar ({error})") from None


def _scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    digest, offsets, keys = hashlib.blake2b(digest_size=16), {}, list[str]()
    with _opened(source, file.path, 0) as tar:
        try:
            for key, start, members in _groups(tar):
                if begins(len(keys)):
                    offsets[len(keys)] = start
                if look is not None:
                    look(len(keys), _sample(tar, key, members, file.name, pictures=False)[0])
                keys.append(f"{file.name}/{key}")
                for member in members:
                    digest.update(f"{member.name}\0{member.size}\0{member.mtime}\n".encode(errors="surrogateescape"))
        except (tarfile.TarError, EOFError, OSError) as error:
            last = f" after {keys[-1]}" if keys else ""
            problem = f"{file.path}: the tar is damaged{last} ({error}); fetch it again or leave it out"
            raise SourceError(problem) from None
    return FileScan(len(keys), digest.hexdigest(), offsets, tuple(keys))


def _rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    with _opened(source, span.path, span.offset) as tar:
        for row, (key, _, members) in enumerate(span.of(_groups(tar)), span.start):
            values, problem = _sample(tar, key, members, span.name)
            own = f"{span.name}/{key}" if source.id is None else own_id(source, values, span, row)
            yield Raw(own, picked(values, wanted), problem)


def _sample(
    tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], place: str, pictures: bool = True
) -> tuple[dict[str, Any], str | None]:
    """The members' contents under their extensions, and what is wrong with one of them.

    Args:
        pictures: Read them too; else they are `Encoded` without bytes.
    """
    values: dict[str, Any] = {"__key__": key}
    problem = None
    for member in members:
        extension = _split_key(member.name)[1]
        if not pictures and _is_picture(extension):
            _add_picture(values, extension, Encoded())
            continue
        data = tar.extractfile(member).read()  # type: ignore[union-attr]
        try:
            _member(values, extension, data)
        except ValueError as error:
            problem = problem or f"{member.name} in {place}: {error}"
    return values, problem


def _is_picture(extension: str) -> bool:
    return f".{extension}".endswith(SUFFIXES["images"])


def _add_picture(values: dict[str, Any], extension: str, picture: Encoded) -> None:
    values[extension] = picture
    values.setdefault("image", picture)


def _member(values: dict[str, Any], extension: str, data: bytes) -> None:
    """Add a tar member's content under its extension, and under ``image``, ``text`` or its own keys."""
    last = extension.rpartition(".")[2]
    if _is_picture(extension):
        _add_picture(values, extension, Encoded(data))
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


WEBDATASET = Format(_scan, _rows, untold)
