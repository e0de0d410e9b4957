"""Columns of the input that are copied to the output: their types, settled over all files of the input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.input.rows import Encoded, field_at, is_picture, picture_type, value_at
from pipeline.input.source import SourceError

JSON_NOTE = {"json": "true"}
EXACT_FLOAT = 1 << 53


def typed_field(name: str, found: pa.Field) -> pa.Field:
    """The output's field for a column whose file tells its type: the same, less metadata of the input alone."""
    kind = found.type
    if is_picture(kind):
        return pa.field(name, picture_type())
    if isinstance(kind, pa.BaseExtensionType):
        shape = getattr(kind, "shape", None)
        note = {"shape": json.dumps(list(shape))} if shape else None
        return pa.field(name, kind.storage_type, metadata=note)
    note = {k: v for k, v in (found.metadata or {}).items() if k in (b"shape", b"dtype", b"doc")}
    return pa.field(name, kind, metadata=note or None)


def merged(one: pa.Field, other: pa.Field) -> pa.Field | None:
    """The field that holds the values of both without changing any, or None if there is none.

    Numbers widen (int32 and int64; whole numbers and float64), null gives way to anything, units of time and forms of
    text and lists become the wider one. Text and numbers do not mix, nor do text and bytes.
    """
    a, b = _plain(one.type), _plain(other.type)
    note = one.metadata if one.metadata == other.metadata else None
    if one.type == other.type:
        return pa.field(one.name, one.type, metadata=note)
    if pa.types.is_null(a):
        return other.with_name(one.name)
    if pa.types.is_null(b):
        return one
    if _loses(a, b):
        return None
    try:
        found = pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    return pa.field(one.name, found.field("x").type, metadata=note)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type behind dictionaries and views, which Arrow does not unify with the plain ones."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def _loses(a: pa.DataType, b: pa.DataType) -> bool:
    """Pairs that Arrow unifies, but not without changing values: as text and bytes."""
    if pa.types.is_null(a) or pa.types.is_null(b):
        return False
    if hasattr(a, "value_type") and hasattr(b, "value_type"):
        return _loses(a.value_type, b.value_type)
    text = (pa.types.is_string, pa.types.is_large_string)
    if any(is_text(a) for is_text in text) != any(is_text(b) for is_text in text):
        return True
    if {pa.types.is_decimal(a), pa.types.is_decimal(b)} == {True, False}:
        return pa.types.is_floating(a) or pa.types.is_floating(b)
    return pa.uint64() in (a, b) and (pa.types.is_signed_integer(a) or pa.types.is_signed_integer(b))


class Values:
    """What kinds of values a column holds whose files do not tell its type."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._kinds = set[type]()
        self._arrays = set[tuple[tuple[int, ...], np.dtype]]()
        self._least = self._most = 0
        for value in values:
            self.add(value)

    def add(self, value: Any) -> None:
        if value is None:
            return
        kind = type(value)
        self._kinds.add(kind)
        if kind is int:
            self._least, self._most = min(self._least, value), max(self._most, value)
        elif kind is np.ndarray:
            self._arrays.add((value.shape, value.dtype))

    def join(self, other: Values) -> None:
        """Whatever another has seen, this has too."""
        self._kinds |= other._kinds
        self._arrays |= other._arrays
        self._least, self._most = min(self._least, other._least), max(self._most, other._most)

    def field(self, name: str) -> pa.Field:
        """Text, numbers, truth values, pictures and arrays keep their type; anything else, and any mixture, is JSON."""
        kinds = self._kinds
        if Encoded in kinds:
            return pa.field(name, picture_type())
        if kinds == {np.ndarray}:
            return self._array_field(name)
        if kinds == {bool}:
            return pa.field(name, pa.bool_())
        if kinds == {int} and self._least >= -(1 << 63) and self._most < 1 << 63:
            return pa.field(name, pa.int64())
        if kinds == {int} and self._least >= 0 and self._most < 1 << 64:
            return pa.field(name, pa.uint64())
        if kinds and kinds <= {int, float} and max(-self._least, self._most) <= EXACT_FLOAT:
            return pa.field(name, pa.float64())
        if kinds <= {str}:
            return pa.field(name, pa.string())
        if kinds == {bytes}:
            return pa.field(name, pa.binary())
        return pa.field(name, pa.string(), metadata=JSON_NOTE)

    def _array_field(self, name: str) -> pa.Field:
        shapes = {shape for shape, _ in self._arrays}
        dtype = np.result_type(*(kind for _, kind in self._arrays))
        if len(shapes) == 1:
            (shape,) = shapes
            note = {"shape": json.dumps(list(shape)), "dtype": str(dtype)}
            return pa.field(name, pa.list_(pa.from_numpy_dtype(dtype), int(np.prod(shape))), metadata=note)
        if all(len(shape) == 1 for shape in shapes):
            return pa.field(name, pa.list_(pa.from_numpy_dtype(dtype)))
        return pa.field(name, pa.string(), metadata=JSON_NOTE)


class Settling:
    """The kept columns' fields while the input's files are scanned one after another.

    Attributes:
        columns: Name in the output -> name in the input, of the columns whose type the input decides.
        keys: Name in the output -> the key of the job file that asks for it; messages name it.
    """

    def __init__(self, columns: Mapping[str, str], keys: Mapping[str, str]) -> None:
        self.columns, self.keys = columns, keys
        self._typed: dict[str, tuple[pa.Field, str]] = {}
        self._values = {name: Values() for name in columns}
        self._rows = 0
        self._lacking: dict[str, list[str]] = {name: [] for name in columns}

    def file(self, path: str, schema: pa.Schema) -> None:
        """A file that tells its columns.

        Raises:
            SourceError: It holds a column in a type that does not go with that of an earlier file.
        """
        for name, column in self.columns.items():
            found = field_at(schema, column)
            if found is None:
                self._lacking[name].append(path)
                continue
            field = typed_field(name, found)
            before, where = self._typed.get(name, (field, path))
            both = merged(before, field)
            if both is None:
                key = self.keys[name]
                raise SourceError(
                    f"{key}: the column {column!r} is {before.type} in {where} and {field.type} in {path}; "
                    f"write it with one type{', or leave it out of keep' * (key == 'keep')}"
                )
            self._typed[name] = both, path if both.type != before.type else where

    def row(self, values: Mapping[str, Any]) -> None:
        """A row of a file that does not tell its columns."""
        self._rows += 1
        for name, column in self.columns.items():
            self._values[name].add(value_at(values, column))

    def join(self, other: Settling) -> None:
        """The rows that another of the same columns was shown."""
        self._rows += other._rows
        for name, values in other._values.items():
            self._values[name].join(values)

    def field(self, before: pa.Field) -> pa.Field:
        """What has been settled for a column; nothing was said about those of formats with fixed columns.

        Args:
            before: Its field by what the beginning of the input told.
        """
        if before.name in self._typed:
            return self._typed[before.name][0]
        return self._values[before.name].field(before.name) if self._rows else before

    def notes(self) -> list[str]:
        """Columns that some files lack: their rows hold null there."""
        return [
            f"{self.keys[name]}: the column {self.columns[name]!r} is not in {len(paths):,} "
            f"file{'s' * (len(paths) > 1)} ({paths[0]}{', ...' * (len(paths) > 1)}); it is null in their rows"
            for name, paths in self._lacking.items()
            if paths
        ]
