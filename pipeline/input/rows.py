"""What reading hands on: rows before their pictures are decoded, spans of files, and what a `Format` has to offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from pipeline.input.source import Source, SourceError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.input.files import InputFile

T = TypeVar("T")


@dataclass(slots=True)
class Encoded:
    """A picture as it was found: bytes, or where to get them.

    Attributes:
        listed: The path was found by listing the input, so whoever started the job named it; else the row says it.
    """

    data: bytes | None = None
    path: str | None = None
    listed: bool = False


@dataclass(slots=True)
class Raw:
    """A row before its pictures are decoded.

    Attributes:
        error: Why it cannot be had.
        twin: Id of the row that it is a duplicate of, as the step before says.
    """

    id: str
    values: dict[str, Any]
    error: str | None = None
    twin: str | None = None


@dataclass(frozen=True)
class Pin:
    """What an input file was when the run was planned: bytes, time or ETag, digest of its content, rows."""

    size: int
    version: str
    digest: str
    rows: int


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` of one file.

    Attributes:
        offset: The byte where row ``start - ahead`` begins, for formats that cannot be entered anywhere.
        ahead: Rows that such a format has to pass over before ``start``, as cheaply as it can.
        pin: What the file was when the run was planned; None before it is.
    """

    name: str
    path: str
    start: int
    stop: int
    offset: int = 0
    ahead: int = 0
    pin: Pin | None = None

    def part(self, skip: int, count: int) -> Span:
        """``count`` of its rows (or as many as there are), after the first ``skip``."""
        start = self.start + skip
        return replace(self, start=start, stop=min(self.stop, start + count), ahead=self.ahead + skip)

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """Its own among all that is found from ``offset`` on."""
        return islice(items, self.ahead, self.ahead + self.stop - self.start)


@dataclass(frozen=True)
class FileScan:
    """What a scan found: number of rows, a digest of what they are, byte offsets of the rows that were asked for.

    ``keys``: the rows' natural keys where the format has them (ids derive from them and have to be checked).
    ``schema``: the columns with their types, where the file tells. ``notes``: what the user should know of it.
    ``also``: another digest that a plan may know the same content by.
    """

    rows: int
    digest: str
    offsets: Mapping[int, int] = field(default_factory=dict)
    keys: tuple[str, ...] | None = None
    schema: pa.Schema | None = None
    notes: tuple[str, ...] = ()
    also: str = ""

    def is_of(self, digest: str, rows: int) -> bool:
        """Whether a plan that says this saw the same content."""
        return rows == self.rows and digest in (self.digest, self.also)


Wanted = Mapping[str, str] | None
"""Name in the row -> name in the input; None: everything."""
Begins = Callable[[int], bool]
"""Whether to note where this row of the file begins."""
Look = Callable[[int, Mapping[str, Any]], None]
"""Is shown each row of a file while it is scanned: its number and its values; pictures as `Encoded` without bytes."""


class Scan(Protocol):
    """How many rows a file has, and where. Formats whose files tell their columns have no use for ``look``."""

    def __call__(self, source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan: ...


@dataclass(frozen=True)
class Format:
    """How one format is read.

    Attributes:
        scan: How many rows a file has, and where.
        rows: A span of them.
        schema: The columns with their types, where the files tell.
    """

    scan: Scan
    rows: Callable[[Source, Span, Wanted], Iterator[Raw]]
    schema: Callable[[Source, InputFile], pa.Schema | None]


def file_digest(file: InputFile) -> str:
    """What stands for a file's content where reading it all would take too long: size, and time or ETag."""
    return f"{file.size}:{file.version}"


LINE_IDS = ("parquet", "jsonl", "csv", "text", "datasets", "npy")
"""Formats whose ids, where the user names no column, are ``<file>#<row>``."""


def derived_id(span_name: str, row: int) -> str:
    """The id of a row that has none of its own."""
    return f"{span_name}#{row}"


def picked(values: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    """The wanted values under the names that the stage knows."""
    return dict(values) if wanted is None else {name: value_at(values, column) for name, column in wanted.items()}


def value_at(values: Mapping[str, Any], column: str) -> Any:
    """A row's value of a column; of ``a.b``, where no column is called so, the key ``b`` of the object in ``a``.

    None where there is none.
    """
    if column in values:
        return values[column]
    outer, _, inner = column.partition(".")
    return value_at(values[outer], inner) if inner and isinstance(values.get(outer), Mapping) else None


def outer(column: str, names: Container[str]) -> str:
    """The column that one is, or that the object lies in of which it is a key."""
    return column if column in names else column.partition(".")[0]


def field_at(schema: pa.Schema | pa.StructType, column: str) -> pa.Field | None:
    """The field of a column, as `value_at` finds it; of two that share a name the first, None where there is none."""
    import pyarrow as pa

    index = next((index for index, field in enumerate(schema) if field.name == column), None)
    if index is not None:
        return schema.field(index)
    outer, _, inner = column.partition(".")
    object_ = field_at(schema, outer) if inner else None
    return field_at(object_.type, inner) if object_ is not None and pa.types.is_struct(object_.type) else None


def own_id(source: Source, values: Mapping[str, Any], span: Span, row: int) -> str:
    """A row's id: from the user's column, else derived. What is no valid text in it is written as an escape; see
    `id_problem`.

    Raises:
        SourceError: The column is empty in this row.
    """
    if source.id is None:
        return derived_id(span.name, row)
    value = values.get(source.id)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise SourceError(f"{span.name}, row {row}: the id column {source.id!r} is empty; every row needs an id")
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    if isinstance(value, (bytes, list, tuple, Mapping, np.ndarray, Encoded)):
        kind = type(value).__name__
        raise SourceError(f"{span.name}, row {row}: the id column {source.id!r} holds {kind}; write text or numbers")
    return valid_text(str(value))


def valid_text(text: str) -> str:
    """What is no character in it (halves of surrogate pairs, bytes of a name that are no UTF-8) as an escape."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def is_text(text: str) -> bool:
    """Whether all of it is characters."""
    return valid_text(text) == text


def id_problem(source: Source, values: Mapping[str, Any]) -> str | None:
    """Why a row cannot bear its id: JSON can name half of a surrogate pair, which no text holds."""
    value = None if source.id is None else values.get(source.id)
    if isinstance(value, str) and not is_text(value):
        return f"the id column {source.id!r} holds half of a surrogate pair; write whole characters"
    return None


def picture_type() -> pa.DataType:
    """What `datasets` stores an Image feature as: these names, in this order."""
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def is_picture(kind: pa.DataType) -> bool:
    """Whether a column of this type says of itself that it holds pictures."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def fixed(**columns: str) -> Callable[[Source, InputFile], pa.Schema]:
    """The schema of a format whose columns are always the same; name -> ``string`` or ``image``."""

    def schema(source: Source, file: InputFile) -> pa.Schema:
        import pyarrow as pa

        types = {"string": pa.string(), "image": picture_type()}
        return pa.schema([(name, types[kind]) for name, kind in columns.items()])

    return schema


def untold(source: Source, file: InputFile) -> None:
    """The files do not say: types come from a sample of rows."""
