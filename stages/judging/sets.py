"""Sets of labelled pictures, read whole from any input: counted before a run, and as arrays for training.

Legend: N pictures; H W C their pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipeline.input.files import list_files
from pipeline.input.files import resolve as settled
from pipeline.input.read import prepare, read_rows, reader_of
from pipeline.input.rows import Raw, Span
from pipeline.input.source import MissingColumn, Source, SourceError

Label = tuple[str, ...]
"""The labels of a picture, one a column."""


class SetError(ValueError):
    """A set cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Census:
    """What a set holds, by its labels alone.

    Attributes:
        counts: Pictures of each class.
        unlabelled: Rows without a label.
        fingerprint: Of its files' content.
    """

    counts: Counter[Label]
    unlabelled: int
    fingerprint: str


@dataclass(frozen=True)
class PictureSet:
    """Pictures with their labels.

    Attributes:
        ids, labels: One a picture.
        x_NHWC: uint8; a memory map on a local disk.
        left_out: Rows without a label, or whose picture cannot be read.
    """

    ids: Sequence[str]
    labels: Sequence[Label]
    x_NHWC: np.ndarray
    left_out: int

    def digests(self) -> dict[bytes, str]:
        """A digest of each picture's pixels -> its id."""
        return {
            hashlib.blake2b(x.tobytes(), digest_size=16).digest(): own
            for own, x in zip(self.ids, self.x_NHWC, strict=True)
        }


def opened(name: str, given: Mapping[str, Any], labels: Sequence[str]) -> Source:
    """A set as it is read: its pictures and labels alone.

    Raises:
        SetError: It cannot be found, or not be told what it is.
    """
    try:
        source = settled(Source.from_json(given).reachable())
    except SourceError as error:
        raise SetError(f"{name}: {error}") from None
    wanted = {column: source.columns.get(column, column) for column in ("image", *labels)}
    if by_folder(source, labels):
        wanted = {"image": "image"}
    return replace(source, columns=wanted)


def by_folder(source: Source, labels: Sequence[str]) -> bool:
    """Whether the labels are names of folders: of files that hold a picture each, and no column says otherwise."""
    return source.format == "images" and not any(name in source.columns for name in labels)


def census(name: str, given: Mapping[str, Any], labels: Sequence[str]) -> Census:
    """Count a set; pictures are not read.

    Raises:
        SetError: It cannot be read, or no row has a label.
    """
    source = opened(name, given, labels)
    folders = by_folder(source, labels)
    next(_rows(name, source), None)  # which refuses a file without such columns
    counted = source if folders else replace(source, columns={column: source.columns[column] for column in labels})
    counts, unlabelled, digest = Counter[Label](), 0, hashlib.blake2b(digest_size=16)
    for raw, _ in _rows(name, counted, digest):
        label = _label(raw, labels, folders)
        if label is None:
            unlabelled += 1
        else:
            counts[label] += 1
    if not counts:
        where = "lies in a folder with its label's name" if folders else f"has a label in {_named(labels)}"
        raise SetError(f"{name}: none of its {unlabelled} pictures {where}; map the columns with {name}.columns")
    return Census(counts, unlabelled, digest.hexdigest())


def read(name: str, given: Mapping[str, Any], labels: Sequence[str], size: int, path: str) -> PictureSet:
    """Read a set.

    Args:
        size: Side that pictures are brought to.
        path: Of the file that the pixels are put into.

    Raises:
        SetError: No picture with a label can be read.
    """
    source = opened(name, given, labels)
    folders = by_folder(source, labels)
    ids, found, left_out = list[str](), list[Label](), 0
    with open(path, "wb") as file:
        for raw, folder in _rows(name, source):
            label = _label(raw, labels, folders)
            x_HWC = None if label is None else _pixels(raw, source, folder, size)
            if label is None or x_HWC is None:
                left_out += 1
                continue
            ids.append(raw.id)
            found.append(label)
            file.write(x_HWC.tobytes())
    if not ids:
        raise SetError(f"{name}: none of its {left_out} pictures can be read; map the column with {name}.columns.image")
    return PictureSet(ids, found, np.memmap(path, np.uint8, "r", shape=(len(ids), size, size, 3)), left_out)


def _rows(name: str, source: Source, digest: Any = None) -> Iterator[tuple[Raw, str]]:
    """All rows of a set, each with the folder of its file; copies that the step before has found are passed over."""
    reader = reader_of(source)
    try:
        for file in list_files(source):
            scan = reader.scan(source, file, lambda row: False)
            if digest is not None:
                digest.update(f"{file.name}\x1f{scan.digest}\x1f{scan.rows}\x1e".encode())
            folder = file.path.rpartition("/")[0]
            span = Span(file.name, file.path, 0, scan.rows)
            for raw in read_rows(source, (span,), 0, scan.rows, source.columns):
                if raw.twin is None:
                    yield raw, folder
    except MissingColumn as error:
        if error.column == source.columns.get("image"):
            raise SetError(f"{name}: {error}; map it with {name}.columns.image") from None
        raise SetError(f"labels: {name}: {error}") from None
    except SourceError as error:
        raise SetError(f"{name}: {error}") from None


def _label(raw: Raw, labels: Sequence[str], folders: bool) -> Label | None:
    """A row's class; None where a label is missing.

    Raises:
        SourceError: A label is neither a text nor a number.
    """
    if folders:
        above = PurePosixPath(raw.id).parts[:-1][-len(labels) :]
        return above if len(above) == len(labels) else None
    values = [raw.values.get(name) for name in labels]
    for name, value in zip(labels, values, strict=True):
        if not isinstance(value, (str, bytes, int, float, np.generic, type(None))):
            raise SourceError(f"{raw.id}: the column {name!r} holds {type(value).__name__}, which is no label")
    if any(value is None or value == "" or value != value for value in values):
        return None
    return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values)


def _pixels(raw: Raw, source: Source, folder: str, size: int) -> np.ndarray | None:
    """A row's picture, (H, W, C) uint8; None where it cannot be read."""
    from PIL import Image, ImageOps

    row, _ = prepare(raw, source, folder, {"image": "picture"})
    if row is None or row.get("image") is None:
        return None
    picture = row["image"].convert("RGB")
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.uint8)


def _named(labels: Sequence[str]) -> str:
    return f"the column{'s' * (len(labels) > 1)} {', '.join(map(repr, labels))}"
