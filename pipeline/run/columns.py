"""Which columns the input has, and whether they are those that a run asks for. All of it is told before any work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.contract import Form
from pipeline.input.files import InputFile, list_files
from pipeline.input.formats.columnar import is_output
from pipeline.input.read import reader_of
from pipeline.input.rows import Look, Raw, Span, field_at, is_picture, outer, value_at
from pipeline.input.source import Source, SourceError
from pipeline.output.kept import Settling, Values, typed_field
from pipeline.output.schema import noted

SAMPLE_ROWS = 200
CAPTIONED_FILES = 20
MAPPED = "input.columns."
CAPTIONS = ("caption", "text", "prompt")
"""Names that captions go by, in this order."""
Reads = Mapping[str, Form] | None
Keep = Mapping[str, str]
"""Kept column -> the key of the job file that asks for it."""


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

    def has(self, key: str, column: str) -> bool:
        """Whether there is the column that a key of the job file asks for. Where one is given a name, ``a.b`` may be
        the key ``b`` of the objects in ``a``.
        """
        if column in self.names or not key.startswith(MAPPED):
            return column in self.names
        if self.schema is not None:
            return field_at(self.schema, column) is not None
        return any(value_at(raw.values, column) is not None for raw in self.rows)

    def field(self, name: str, column: str) -> pa.Field:
        """The output's field for an input column, by what has been seen so far."""
        if self.schema is None or not self.has(MAPPED, column):
            return Values(value_at(raw.values, column) for raw in self.rows).field(name)
        found = self.late[column] if column in self.late else field_at(self.schema, column)
        assert found is not None
        return typed_field(name, found)


def look(source: Source, keep: Keep, limit: int | None, reads: Reads) -> Seen:
    """Read the beginning of a resolved input, and as much more as it takes to find the columns that are asked for.

    Args:
        reads: What the stage takes of a row.

    Raises:
        SourceError: A column that is asked for is nowhere, or is there twice.
    """
    files = list_files(source)
    first, reader = next(files), reader_of(source)
    schema = reader.schema(source, first)
    asked = _asked(source, keep)
    if schema is not None:
        check_file(source, first, schema, keep, reads)
    sample: tuple[Raw, ...] = ()
    if schema is None or keep:
        everything = replace(source, id=None)  # ids are checked by the scan, which names the row
        span = Span(first.name, first.path, 0, min(SAMPLE_ROWS, limit or SAMPLE_ROWS))
        sample = tuple(islice(reader.rows(everything, span, None), SAMPLE_ROWS))
    seen = Seen(schema, sample, {})
    missing = {column for key, column in asked if not seen.has(key, column)}
    if missing and seen.names:
        late = _typed_late(source, files, missing) if schema is not None else _found_late(source, missing)
        seen = replace(seen, late=late)
    _check(source, asked, seen)
    return seen


def _asked(source: Source, keep: Keep) -> list[tuple[str, str]]:
    """(Key of the job file, the input's column) for every column that is named."""
    named = [(f"{MAPPED}{name}", column) for name, column in source.columns.items()]
    named += [(key, name) for name, key in keep.items() if name not in {*source.columns, *source.variants}]
    return named + ([("input.id", source.id)] if source.id is not None else [])


def _check(source: Source, asked: list[tuple[str, str]], seen: Seen) -> None:
    for key, column in asked:
        if seen.names and not seen.has(key, column):
            hint = _offer(column, seen.names)
            if seen.has(MAPPED, column):
                hint = f"give what lies in {column.partition('.')[0]!r} a name: columns: {{...: {column}}}"
            raise SourceError(f"{key}: the input has no column {column!r}; {hint}")
    for name in source.images:
        if source.columns and name not in source.columns:
            raise SourceError(f"input.images: {name!r} is not one of the mapped columns {', '.join(source.columns)}")


def check_file(source: Source, file: InputFile, schema: pa.Schema, keep: Keep, reads: Reads) -> None:
    """Whether a file has the columns that every file has to have (kept ones may be missing), and each once.

    A name that stands twice in a header or schema means two columns, and there is no telling which is meant.

    Raises:
        SourceError: It has not; the message names the file.
    """
    for key, column in _asked(source, {}):
        if column not in schema.names and not (key.startswith(MAPPED) and field_at(schema, column)):
            raise SourceError(f"{key}: {file.path} has no column {column!r}; {_offer(column, schema.names)}")
    asked = _asked(source, keep)
    named = {outer(column, schema.names): key for key, column in asked}
    if not source.columns:
        everything = [name for name in schema.names if name] if reads is None else reads
        named |= {name: "input" for name in everything if name not in named}
    for column, key in named.items():
        count = schema.names.count(column)
        if count > 1:
            times = "twice" if count == 2 else f"{count} times"
            raise SourceError(f"{key}: {file.path} has the column {column!r} {times}; give each a name of its own")


class Watched:
    """Follows the scan of an input: whether each file has the columns it has to have, what types the kept ones take.

    Attributes:
        kept: Settles those types.
    """

    def __init__(self, source: Source, keep: Keep, reads: Reads) -> None:
        self._source, self.keep, self.reads = source, keep, reads
        columns = {name: source.columns.get(name, name) for name in keep if name not in source.variants}
        self.kept = Settling(columns, keep)

    def look(self, rows: int | None) -> Look | None:
        """What a file's scan shows its rows to, where they have a say; only the first ``rows`` of them count."""
        if not self.kept.columns:
            return None

        def shown(row: int, values: Mapping[str, Any]) -> None:
            if rows is None or row < rows:
                self.kept.row(values)

        return shown

    def file(self, file: InputFile, schema: pa.Schema) -> None:
        """A file that tells its columns.

        Raises:
            SourceError: It lacks one, has one twice, or has a kept one in a type that does not go with another file's.
        """
        check_file(self._source, file, schema, self.keep, self.reads)
        self.kept.file(file.path, schema)

    def join(self, rows: Settling | None) -> None:
        """What the rows of a file, shown to another, said."""
        if rows is not None:
            self.kept.join(rows)

    def settled(self, schema: pa.Schema) -> pa.Schema:
        """The output's schema, now that all of the input has been scanned."""
        for name in self.kept.columns:
            index = schema.get_field_index(name)
            schema = schema.set(index, self.kept.field(schema.field(index)))
        return noted(schema)


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
        mapped = source.columns.values()
        fields = {name: field_at(schema, name) for name in missing - found.keys()
                  if name in mapped or name in schema.names}  # fmt: skip
        found |= {name: field for name, field in fields.items() if field is not None}
        if len(found) == len(missing):
            break
    return found


def _found_late(source: Source, missing: set[str]) -> dict[str, pa.Field | None]:
    """Names that stand in some row of the input, wherever; every row is read until all are found."""
    found: dict[str, pa.Field | None] = {}

    def shown(row: int, values: Mapping[str, object]) -> None:
        mapped = source.columns.values()
        there = (name for name in missing if name in values or (name in mapped and value_at(values, name) is not None))
        found.update((name, None) for name in there)
        if len(found) == len(missing):
            raise _AllFound

    try:
        for file in list_files(source):
            reader_of(source).scan(source, file, lambda row: False, shown)
    except _AllFound:
        pass
    return found


def written_by_runs(source: Source, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some columns that an earlier run wrote into a resolved input, and that have one type wherever they are.

    The first file of each folder is looked at.
    """
    folders: set[str] = set()
    types: dict[str, set[pa.DataType]] = {name: set() for name in names}
    written: set[str] = set()
    for file in list_files(source) if names else ():
        folder = file.path.rpartition("/")[0]
        if folder in folders:
            continue
        folders.add(folder)
        schema = reader_of(source).schema(source, file)
        if schema is None:
            break
        for name in types.keys() & set(schema.names):
            types[name] |= {field.type for field in schema if field.name == name}
            written |= {name} if is_output(schema) else set()
    return tuple(name for name in names if name in written and len(types[name]) == 1)


class _AllFound(Exception):
    """Ends a scan that has seen enough."""


def unused_captions(source: Source, seen: Seen, reads: Reads) -> list[str]:
    """A note, where the input has captions and the stage looks for them under another name."""
    wanted = [name for name, form in (reads or {}).items() if form == "text"]
    if source.columns or not wanted or set(wanted) & set(seen.names):
        return []
    found = _captions_in(source, seen, reads)
    if not found:
        return []
    columns = {name: name for name in (reads or {}) if name in seen.names} | found
    return [
        f"the captions in the input's column {found[wanted[0]]!r} are not used: the job reads them from {wanted[0]!r}. "
        f"To use them, write{_mapping(columns).removeprefix('Write')}"
    ]


def _captions_in(source: Source, seen: Seen, reads: Reads) -> dict[str, str]:
    """The first text that the stage takes -> the column that most likely holds it; empty where none does."""
    wanted = [name for name, form in (reads or {}).items() if form == "text"]
    names = (*wanted[:1], *CAPTIONS)
    here = next((name for name in names if name in seen.names and _holds_text(source, name)), None)
    return {wanted[0]: here} if wanted and here else {}


def check_pictures(source: Source, seen: Seen, reads: Reads) -> None:
    """Whether there are pictures where the stage takes them from; else every row would fail.

    Raises:
        SourceError: The mapping leaves them out, or the input tells its columns, and none of its files has that one, or
            it holds lists or objects.
    """
    for name, form in (reads or {}).items():
        if form != "picture":
            continue
        if source.columns and name not in source.columns:
            raise SourceError(
                f"columns names {', '.join(source.columns)} alone, so the pictures that the job reads from {name!r} "
                f"are left out. {_mapping({name: _pictures_in(seen), **source.columns})}"
            )
        told = not source.columns and seen.schema is not None and name not in seen.names
        if told and not _typed_late(source, list_files(source), {name}):
            mapped = {name: _pictures_in(seen)} | _captions_in(source, seen, reads)
            raise SourceError(
                f"the job reads pictures from {name!r}; there is no such column, but {', '.join(seen.names)}. "
                f"{_mapping(mapped)}"
            )
    for said in _nested(source, seen, reads, "picture"):
        raise SourceError(said)


_PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")


def _pictures_in(seen: Seen) -> str:
    """The column that most likely holds the pictures, by its name or its type; dots where none does."""
    typed = [] if seen.schema is None else [field.name for field in seen.schema if is_picture(field.type)]
    return next((name for name in (*_PICTURES, *typed) if name in seen.names), "...")


def _mapping(columns: Mapping[str, str]) -> str:
    return f"Write: columns: {{{', '.join(f'{name}: {column}' for name, column in columns.items())}}}"


def _nested(source: Source, seen: Seen, reads: Reads, form: Form) -> list[str]:
    """What to say of columns that a text or a picture is taken from, and that hold lists or objects (first file)."""
    said = []
    for name in [name for name, own in (reads or {}).items() if own == form]:
        column = source.columns.get(name) if source.columns else name
        found = None if seen.schema is None or column is None else field_at(seen.schema, column)
        if found is None:
            continue
        kind = found.type
        fits = form == "picture" and pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}
        if pa.types.is_nested(kind) and not fits:
            key = f"input.columns.{name}" if source.columns else "input"
            said.append(f"{key}: the column {column!r} holds {kind}, and the job takes one {form} a row")
    return said


def mistaken_texts(source: Source, seen: Seen, reads: Reads) -> list[str]:
    """A note for each column of texts that holds something else, by its type."""
    return [
        f"{said}: every row that has one will fail. Write a column with one text a row"
        for said in _nested(source, seen, reads, "text")
    ]


def check_texts(source: Source, seen: Seen, reads: Reads) -> None:
    """A stage that looks for a text under several names would go without one in every row.

    Raises:
        SourceError: The input tells its columns, or the mapping does, and none of these is among them.
    """
    names = [name for name, form in (reads or {}).items() if form == "text?"]
    told = list(source.columns) or (seen.names if seen.schema is not None else [])
    if names and told and "text" not in (reads or {}).values() and not set(names) & set(told):
        raise SourceError(
            f"the job reads texts from {' or '.join(names)}; there is no such column, but {', '.join(told)}. "
            f"Write: columns: {{{names[0]}: ...}}, with what else is to be read"
        )


def check_needs(source: Source, seen: Seen, needs: Mapping[tuple[str, ...], str]) -> None:
    """Whether the input has what every row has to have.

    Args:
        needs: As `StageInfo.needs`.

    Raises:
        SourceError: No row of it can have it.
    """
    told = list(source.columns) or seen.names
    for columns, why in needs.items():
        wanted = set(columns)
        if not told or wanted & {*told, *source.variants}:
            continue
        if not source.columns:
            files = list_files(source)
            if _found_late(source, wanted) if seen.schema is None else _typed_late(source, files, wanted):
                continue
        mapped = f"; write it under input.columns too: columns: {{{columns[0]}: ...}}" if source.columns else ""
        names, others = " or ".join(map(repr, columns)), ", ".join(name for name in told if name not in source.variants)
        raise SourceError(f"{why}: the input has no column {names}, but {others}{mapped}")


def _holds_text(source: Source, column: str) -> bool:
    """Whether the first row of one of the first files has a text there: pictures have the column, text or not."""
    plain = replace(source, variants={}, id=None)
    for file in islice(list_files(source), CAPTIONED_FILES):
        for raw in reader_of(plain).rows(plain, Span(file.name, file.path, 0, 1), {"text": column}):
            text = raw.values.get("text")
            if isinstance(text, str) and text.strip():
                return True
    return False
