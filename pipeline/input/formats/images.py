"""Folders of pictures: a row a file, with the caption from a ``.txt`` beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.input.files import InputFile
from pipeline.input.rows import (
    Begins,
    Encoded,
    FileScan,
    Format,
    Look,
    Raw,
    Span,
    Wanted,
    file_digest,
    fixed,
    picked,
)
from pipeline.input.source import Source
from pipeline.input.streams import open_input


def _images_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    return FileScan(1, file_digest(file), keys=(file.name,))


def _images_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    values: dict[str, Any] = {"image": Encoded(None, span.path, listed=True), "path": span.name}
    if wanted is None or "text" in wanted.values():
        values["text"] = _sidecar(source, span.path)
    yield Raw(span.name, picked(values, wanted))


def _sidecar(source: Source, path: str) -> str | bytes | None:
    """The caption in ``picture.txt`` beside ``picture.jpg``, if there is one; bytes where it is not UTF-8."""
    stem = path[: -len(PurePosixPath(path).suffix)]
    try:
        with open_input(stem + ".txt", source) as handle:
            said = handle.read()
    except FileNotFoundError:
        return None
    try:
        return said.decode("utf-8-sig").strip()
    except UnicodeDecodeError:  # who reads it is told; a picture whose caption nobody reads is none the worse
        return said


IMAGES = Format(_images_scan, _images_rows, fixed(image="image", path="string", text="string"))
