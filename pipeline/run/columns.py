"""Which columns the input has, and whether they are those that a run asks for. All of it is told before any work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa

from pipeline.input.files import InputFile, list_files
from pipeline.input.read import reader_of
from pipeline.input.rows import Raw, Span
from pipeline.input.source import Source, SourceError
from pipeline.output.kept import Values, typed_field

SAMPLE_ROWS = 200


@dataclass(frozen=True)
class Seen:
    """What the input looks like before it is scanned.

    Attributes:
        schema: The first file's, where files tell their columns.
        rows: The first rows; empty where nothing hangs on them.
        late: Names that are asked for and that no first row holds, but a later one does (or another file), with the
            type where that file tells it.
    """

    schema: pa.Schema | None
    rows: tuple[Raw, ...]
    late: Mapping[str, pa.Field | None]

    @property
    def names(self) -> list[str]:
        if self.schema is not None:
            return [*self.schema.names, *self.late]
        return sorted({name for raw in self.rows for name in raw.values} | set(self.late))

    def field(self, name: str, column: str) -> pa.Field:
        """The output's field for an input column, by what has been seen so far."""
        if self.schema is None or column not in self.names:
            return Values(raw.values.get(column) for raw in self.rows).field(name)
        found = self.late[column] if column in self.late else self.schema.field(column)
        assert found is not None
        return typed_field(name, found)


def look(source: Source, keep: tuple[str, ...], limit: int | None) -> Seen:
    """Read the beginning of a resolved input, and as much more as it takes to find the columns that are asked for.

    Raises:
        SourceError: A column that is asked for is nowhere, or is there twice.
    """
    files = list_files(source)
    first, reader = next(files), reader_of(source)
    schema = reader.schema(source, first)
    asked = _asked(source, keep)
    if schema is not None:
        check_file(source, first, schema, keep)
    sample: tuple[Raw, ...] = ()
    if schema is None or keep:
        everything = replace(source, id=None)  # ids are checked by the scan, which names the row
        span = Span(first.name, first.path, 0, min(SAMPLE_ROWS, limit or SAMPLE_ROWS))
        sample = tuple(islice(reader.rows(everything, span, None), SAMPLE_ROWS))
    seen = Seen(schema, sample, {})
    missing = {column for _, column in asked if column not in seen.names}
    if missing and seen.names:
        late = _typed_late(source, files, missing) if schema is not None else _found_late(source, missing)
        seen = replace(seen, late=late)
    _check(source, asked, seen.names)
    return seen


def _asked(source: Source, keep: tuple[str, ...]) -> list[tuple[str, str]]:
    """(Key of the job file, the input's column) for every column that is named."""
    named = [(f"the input's columns ({name})", column) for name, column in source.columns.items()]
    named += [("keep", name) for name in keep if name not in {*source.columns, *source.variants}]
    return named + ([("id", source.id)] if source.id is not None else [])


def _check(source: Source, asked: list[tuple[str, str]], available: list[str]) -> None:
    for key, column in asked:
        if available and column not in available:
            raise SourceError(f"{key}: the input has no column {column!r}; {_offer(column, available)}")
    for name in source.images:
        if source.columns and name not in source.columns:
            raise SourceError(f"images: {name!r} is not one of the mapped columns {', '.join(source.columns)}")


def check_file(source: Source, file: InputFile, schema: pa.Schema, keep: tuple[str, ...]) -> None:
    """Whether a file has the columns that every file has to have (kept ones may be missing), and each once.

    Raises:
        SourceError: It has not; the message names the file.
    """
    for key, column in _asked(source, keep):
        if column not in schema.names and key != "keep":
            raise SourceError(f"{key}: {file.path} has no column {column!r}; {_offer(column, schema.names)}")
        count = schema.names.count(column)
        if count > 1:
            times = "twice" if count == 2 else f"{count} times"
            raise SourceError(f"{key}: {file.path} has the column {column!r} {times}; give each a name of its own")


def _offer(column: str, available: list[str]) -> str:
    near = difflib.get_close_matches(column, available, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}It has {', '.join(available)}." if hint else f"it has {', '.join(available)}"


def _typed_late(source: Source, files: Iterable[InputFile], missing: set[str]) -> dict[str, pa.Field | None]:
    """Fields of the columns that the first file lacks, from the first file that has them."""
    found: dict[str, pa.Field | None] = {}
    for file in files:
        schema = reader_of(source).schema(source, file)
        if schema is None:
            return found
        found |= {name: schema.field(name) for name in missing - found.keys() if name in schema.names}
        if len(found) == len(missing):
            break
    return found


def _found_late(source: Source, missing: set[str]) -> dict[str, pa.Field | None]:
    """Names that stand in some row of the input, wherever; every row is read until all are found."""
    found: dict[str, pa.Field | None] = {}

    def shown(row: int, values: Mapping[str, object]) -> None:
        found.update((name, None) for name in missing & values.keys())
        if len(found) == len(missing):
            raise _AllFound

    try:
        for file in list_files(source):
            reader_of(source).scan(source, file, lambda row: False, shown)
    except _AllFound:
        pass
    return found


class _AllFound(Exception):
    """Ends a scan that has seen enough."""
