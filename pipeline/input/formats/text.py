"""A row a line: plain text, and JSONL."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from pipeline.input.files import InputFile
from pipeline.input.rows import (
    Begins,
    FileScan,
    Format,
    Look,
    Raw,
    Span,
    Wanted,
    derived_id,
    fixed,
    id_problem,
    outer,
    own_id,
    picked,
    untold,
)  # fmt: skip
from pipeline.input.source import Source, SourceError
from pipeline.input.streams import AsItComes, check_text, codec_of, decompressing, open_input

LONGEST_LINE = 1 << 27
"""Bytes, after decompression: a kilobyte of gzip can hold a line that fills the memory."""
READ_BYTES = 1 << 20
LineLook = Callable[[int, bytes], None]


def read_lines(source: Source, path: str, offset: int) -> Iterator[bytes]:
    """Lines with their ends, from a byte on that begins one.

    Raises:
        SourceError: The file is no text, or compressed and damaged, or a line has no end within `LONGEST_LINE`.
    """
    with open_input(path, source) as handle, decompressing(path):
        if offset:
            handle.seek(offset)
        number = 0
        raw: Any = AsItComes(handle) if codec_of(path) else handle
        lines = handle if isinstance(handle, io.BufferedReader) else io.BufferedReader(raw, READ_BYTES)
        while line := lines.readline(LONGEST_LINE + 1):
            if not number and not offset:
                check_text(path, line[:16])
            number += 1
            if len(line) > LONGEST_LINE:
                where = f"line {number}" + (" from a shard's beginning on" if offset else "")
                raise SourceError(f"{path}: {where} is longer than {LONGEST_LINE:,} bytes; break it up or leave it out")
            yield line


def _scan(source: Source, file: InputFile, begins: Begins, blank: bool, line_look: LineLook | None = None) -> FileScan:
    digest, offsets, rows, position = hashlib.blake2b(digest_size=16), {}, 0, 0
    for line in read_lines(source, file.path, 0):
        digest.update(line)
        if blank or line.strip():
            if begins(rows):
                offsets[rows] = position
            if line_look is not None:
                line_look(rows, line)
            rows += 1
        position += len(line)
    return FileScan(rows, digest.hexdigest(), offsets)


def _text_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    return _scan(source, file, begins, blank=True)


def _text(line: bytes, first: bool) -> str:
    if first and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    return line.rstrip(b"\n").removesuffix(b"\r").decode()


def _text_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    names = ["text"] if wanted is None else [name for name, column in wanted.items() if column == "text"]
    prefix = span.name + "#"
    for row, line in enumerate(span.of(read_lines(source, span.path, span.offset)), span.start):
        try:
            text = _text(line, row == 0)
        except UnicodeDecodeError as error:
            yield Raw(prefix + str(row), {}, f"line {row + 1} of {span.name} is not UTF-8: {error.reason}")
            continue
        yield Raw(prefix + str(row), dict.fromkeys(names, text))


def _jsonl_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    lines = (line for line in read_lines(source, span.path, span.offset) if line.strip())
    for row, line in enumerate(span.of(lines), span.start):
        problem = ""
        try:
            text = _text(line, row == 0)
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"row {row} of {span.name} is not JSON: {error}"
        else:
            if not isinstance(values, dict):
                problem = f"row {row} of {span.name} is no JSON object"
            elif twice := _twice(text, values if wanted is None else (outer(own, values) for own in wanted.values())):
                problem = f"row {row} of {span.name} has the key {twice!r} twice; there is no telling which is meant"
        if not problem:
            yield Raw(own_id(source, values, span, row), picked(values, wanted), id_problem(source, values))
        elif source.id is None:
            yield Raw(derived_id(span.name, row), {}, problem)
        else:
            raise SourceError(f"{problem}, so its id {source.id!r} cannot be read; mend or remove the line")


def _twice(text: str, names: Iterable[str]) -> str | None:
    """The first of the names that stands twice among the keys of a JSON object."""
    suspects = [name for name in names if text.count(f'"{name}"') > 1]
    if not suspects:
        return None
    keys: list[str] = []

    def seen(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]  # the outermost object comes last

    json.loads(text, object_pairs_hook=seen)
    return next((name for name in suspects if keys.count(name) > 1), None)


def _jsonl_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    first = next((line for line in read_lines(source, file.path, 0) if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t")
    if first.startswith(b"["):
        raise SourceError(f"{file.path}: is a JSON array; write one JSON object a line (JSONL) instead")
    if first.strip() == b"{":
        raise SourceError(f"{file.path}: is JSON over several lines; write one JSON object a line (JSONL) instead")

    def parsed(row: int, line: bytes) -> None:
        assert look is not None
        with suppress(ValueError, RecursionError):  # such a line becomes a failed row when it is read
            values = json.loads(_text(line, row == 0))
            look(row, values if isinstance(values, dict) else {})

    return _scan(source, file, begins, blank=False, line_look=None if look is None else parsed)


TEXT = Format(_text_scan, _text_rows, fixed(text="string"))
JSONL = Format(_jsonl_scan, _jsonl_rows, untold)
