"""The output's columns in Arrow, and how rows become tables."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import Column
from pipeline.input.rows import Encoded, Raw, picture_type, valid_text, value_at

SCHEMA_VERSION = 1
"""Counts up when the layout of the output changes; part of every run fingerprint."""

IMAGE = picture_type()

_PLAIN = {
    "string": pa.string(),
    "json": pa.string(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "image": IMAGE,
}


class CellError(ValueError):
    """A value does not fit its column; the row becomes a failed one."""


def column_field(column: Column) -> pa.Field:
    """The Arrow field of a stage's column."""
    note = {"doc": column.doc} if column.doc else {}
    if column.kind != "tensor":
        return pa.field(column.name, _PLAIN[column.kind], metadata=note or None)
    size = -1 if -1 in column.shape else math.prod(column.shape)  # -1 is any length to Arrow too
    value = pa.float16() if column.dtype == "float16" else pa.float32()
    note |= {"shape": json.dumps(list(column.shape)), "dtype": column.dtype}
    return pa.field(column.name, pa.list_(value, size), metadata=note)


def _is_tensor(field: pa.Field) -> bool:
    """A column that `column_field` made of a tensor, or a kept vector of the same form."""
    kind = field.type
    listed = pa.types.is_fixed_size_list(kind) or (pa.types.is_list(kind) and b"shape" in (field.metadata or {}))
    return listed and pa.types.is_floating(kind.value_type)


def output_schema(
    kept: Sequence[pa.Field], columns: Sequence[Column], metadata: Mapping[str, str], twins: bool = False
) -> pa.Schema:
    """id, kept columns, the stage's columns, status, error; with the metadata that makes `datasets` decode pictures.

    Args:
        metadata: File-level key-value metadata.
        twins: Rows may be duplicates; ``duplicate_of`` says of which.

    Raises:
        ValueError: Two columns have the same name.
    """
    fields = [
        pa.field("id", pa.string(), nullable=False),
        *kept,
        *map(column_field, columns),
        *([pa.field("duplicate_of", pa.string())] if twins else []),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
    names = [field.name for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two output columns are called {twice[0]!r}; rename the kept one with the input's columns")
    return noted(pa.schema(fields, metadata=dict(metadata)))


def noted(schema: pa.Schema) -> pa.Schema:
    """The schema with the note that makes `datasets` decode its pictures, and no such note where it has none."""
    features = {field.name: {"_type": "Image"} for field in schema if field.type == IMAGE}
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != b"huggingface"}
    if features:
        metadata[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    return schema.with_metadata(metadata)


def picture_columns(schema: pa.Schema) -> frozenset[str]:
    return frozenset(field.name for field in schema if field.type == IMAGE)


def json_columns(schema: pa.Schema) -> frozenset[str]:
    """Kept columns that hold other things than the input's format has a type for, as JSON texts."""
    return frozenset(field.name for field in schema if (field.metadata or {}).get(b"json"))


def as_json(value: Any) -> str | None:
    """A value of one of `json_columns` in the form that `cells` takes."""
    return None if value is None else json.dumps(value, default=_as_json)


def _as_json(value: Any) -> Any:
    """What JSON has no form of: arrays as lists, bytes in base64, dates and the like as text."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def cells(values: Sequence[Any], field: pa.Field) -> Sequence[Any]:
    """Check values against their column, and bring them into the form that `column_array` takes.

    Raises:
        CellError: One does not fit.
    """
    kind = field.type
    fits: Callable[[Any, pa.Field], Any]
    if _is_tensor(field):
        fits = _numbers
    elif kind == IMAGE:
        fits = _picture
    elif pa.types.is_integer(kind):
        fits = _whole
    elif pa.types.is_string(kind):
        fits = _text
    else:
        return values
    return [None if value is None else fits(value, field) for value in values]


def _numbers(value: Any, field: pa.Field) -> np.ndarray:
    kind = field.type
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if pa.types.is_fixed_size_list(kind) and array.size != kind.list_size:
        raise CellError(f"column {field.name!r}: {array.size} values, expected {kind.list_size}")
    dtype = kind.value_type.to_pandas_dtype()
    if array.dtype == dtype:
        return array.reshape(-1)
    with np.errstate(over="ignore"):
        stored = array.reshape(-1).astype(dtype)
    if not np.isfinite(stored).all() and np.isfinite(array).all():
        raise CellError(f"column {field.name!r}: overflows {kind.value_type}")
    return stored


def _picture(value: Any, field: pa.Field) -> dict[str, Any]:
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, Encoded):
        return {"bytes": value.data, "path": None}
    raise CellError(f"column {field.name!r}: expected a picture, got {type(value).__name__}")


def _whole(value: Any, field: pa.Field) -> Any:
    if isinstance(value, float) and not value.is_integer():
        raise CellError(f"column {field.name!r}: {value} is no whole number")  # Arrow would cut it
    return value


def _text(value: Any, field: pa.Field) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return json.dumps(value, default=str)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise CellError(f"column {field.name!r}: {len(value)} bytes that are no UTF-8 text") from None


def column_array(values: Sequence[Any], field: pa.Field) -> pa.Array:
    """Checked cells as an Arrow array."""
    kind = field.type
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
        missing = np.fromiter((value is None for value in values), bool, len(values))
        blank = np.zeros(kind.list_size, kind.value_type.to_pandas_dtype())
        flat = np.concatenate([blank if value is None else value for value in values]) if values else blank[:0]
        mask = pa.array(missing) if missing.any() else None
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind, mask=mask)
    if _is_tensor(field):
        lengths = [0 if value is None else len(value) for value in values]
        starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        blank = np.zeros(0, kind.value_type.to_pandas_dtype())
        flat = pa.array(np.concatenate([blank, *(value for value in values if value is not None)]))
        missing = pa.array([value is None for value in values], pa.bool_())
        return pa.ListArray.from_arrays(starts, flat, type=kind, mask=missing)
    return pa.array([value.tolist() if isinstance(value, np.ndarray) else value for value in values], type=kind)


def _fail(values: Sequence[Any], field: pa.Field) -> str | None:
    try:
        column_array(cells(values, field), field)
    except (CellError, pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        return str(error) if isinstance(error, CellError) else f"column {field.name!r}: {error}"
    return None


def misfits(rows: Sequence[Mapping[str, Any]], fields: Iterable[pa.Field]) -> list[dict[str, str]]:
    """Of each row, the columns whose values do not fit, and why."""
    found: list[dict[str, str]] = [{} for _ in rows]
    for field in fields:
        values = [row.get(field.name) for row in rows]
        if _fail(values, field) is None:
            continue
        for value, problems in zip(values, found, strict=True):
            if (problem := _fail([value], field)) is not None:
                problems[field.name] = problem
    return found


def table(rows: list[dict[str, Any]], schema: pa.Schema, kept: frozenset[str] = frozenset()) -> pa.Table:
    """Finished rows as a table. A row with a value that does not fit becomes a failed row with null outputs.

    Args:
        rows: Each with ``id``, ``status``, ``error``, and what it has of the other columns.
        kept: Columns copied from the input; a failed row keeps those of them that fit.
    """
    try:
        return _table(rows, schema)
    except (CellError, pa.ArrowException, ValueError, TypeError, OverflowError):
        return _table([_mended(row, schema, kept) for row in rows], schema)


def _mended(row: dict[str, Any], schema: pa.Schema, kept: frozenset[str]) -> dict[str, Any]:
    row = {**row, "id": valid_text(row["id"]), "error": valid_text(row["error"]) if row.get("error") else None}
    (problems,) = misfits([row], schema)
    if not problems:
        return row
    fitting = {name: value for name, value in row.items() if name in kept and name not in problems}
    return {**fitting, "id": row["id"], "status": "failed", "error": valid_text(next(iter(problems.values())))}


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = ((field, [row.get(field.name) for row in rows]) for field in schema)
    arrays = [column_array(cells(values, field), field) for field, values in columns]
    return pa.Table.from_arrays(arrays, schema=schema)


def measures(rows: pa.Table, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Count, sum, least and greatest finite value of numeric columns over rows with status ok."""
    ok = np.asarray(rows["status"].to_pylist()) == "ok"
    found = {}
    for name in names:
        values = pc.cast(rows[name], pa.float64(), safe=False).to_numpy()[ok]
        values = values[np.isfinite(values)]
        if values.size:
            found[name] = {"n": values.size, "sum": float(values.sum()), "min": float(values.min()),
                           "max": float(values.max())}  # fmt: skip
    return found


def merge_measures(into: dict[str, dict[str, float]], more: Mapping[str, Mapping[str, float]]) -> None:
    """Add one shard's measures to the running ones."""
    for name, part in more.items():
        total = into.setdefault(name, {"n": 0, "sum": 0.0, "min": math.inf, "max": -math.inf})
        total["n"] += part["n"]
        total["sum"] += part["sum"]
        total["min"] = min(total["min"], part["min"])
        total["max"] = max(total["max"], part["max"])


def means(total: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Merged measures as count, mean, min, max."""
    return {
        name: {"n": m["n"], "mean": m["sum"] / m["n"], "min": m["min"], "max": m["max"]} for name, m in total.items()
    }


def encode_schema(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


@lru_cache(16)
def decode_schema(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def sample_bytes(raws: Sequence[Raw], name: str) -> float:
    """Mean size of a column's values in a sample, for estimates."""
    sizes = []
    for raw in raws:
        value = value_at(raw.values, name)
        if isinstance(value, np.ndarray):
            sizes.append(value.nbytes)
        elif isinstance(value, Encoded):
            sizes.append(len(value.data or b""))
        else:
            sizes.append(len(str(value)))
    return sum(sizes) / len(sizes) if sizes else 0.0
