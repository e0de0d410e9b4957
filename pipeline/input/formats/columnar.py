"""Arrow tables: Parquet, and datasets as Hugging Face's ``save_to_disk`` writes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.input.files import InputFile
from pipeline.input.forms import as_picture
from pipeline.input.rows import (
    Begins,
    FileScan,
    Format,
    Look,
    Raw,
    Span,
    Wanted,
    file_digest,
    is_picture,
    own_id,
    picked,
    picture_type,
)  # fmt: skip
from pipeline.input.source import Source, SourceError
from pipeline.input.streams import open_input

if TYPE_CHECKING:
    import pyarrow as pa

CACHED_GROUP_BYTES = 256 << 20
"""A Parquet row group up to this size is kept while the shards that share it are read one after another."""
BATCH_ROWS = 1024


def _picture_names(schema: pa.Schema) -> set[str]:
    """Columns that hold pictures: by their type, or because the ``huggingface`` metadata says so."""
    names = {field.name for field in schema if is_picture(field.type)}
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw:
        features = (json.loads(raw).get("info") or {}).get("features") or {}
        names |= {name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"}
    return names & set(schema.names)


def _shown(schema: pa.Schema) -> pa.Schema:
    """The schema with one type for all that is read as a picture, also where metadata alone says so."""
    pictures = _picture_names(schema)
    for index, field in enumerate(schema):
        if field.name in pictures:
            schema = schema.set(index, field.with_type(picture_type()))
    return schema


def column_values(array: pa.Array, field: pa.Field, picture: bool = False) -> list[Any]:
    """An Arrow column as Python values: pictures as `Encoded`, lists of numbers as numpy arrays (lists, if with nulls).

    An array whose field says so (``shape`` in its metadata, or a fixed-shape tensor type) gets its shape back.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, shape = field.type, None
    if isinstance(kind, pa.BaseExtensionType):
        shape = getattr(kind, "shape", None)
        array, kind = array.storage, kind.storage_type
    if picture:
        return [as_picture(value) for value in array.to_pylist()]
    listed = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not listed or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        return array.to_pylist()
    noted = (field.metadata or {}).get(b"shape")
    if noted:
        shape = tuple(json.loads(noted))
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    flat = array.flatten()
    vectors = pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)  # a gap in one is NaN
    gaps = bool(flat.null_count) and not vectors
    if not gaps:
        flat = flat.to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    values = []
    for end, length, there in zip(ends, lengths, valid, strict=True):
        value = flat[end - length : end] if there else None
        if gaps and value is not None:  # numpy knows no null: it would make whole numbers to floats
            value = value.to_pylist() if value.null_count else value.to_numpy(zero_copy_only=False)
        if shape and isinstance(value, np.ndarray) and value.size == np.prod(shape):
            value = value.reshape(shape)
        values.append(value)
    return values


def _arrow_rows(
    source: Source, span: Span, wanted: Wanted, batches: Iterator[pa.RecordBatch | pa.Table], schema: pa.Schema
) -> Iterator[Raw]:
    row, own, pictures = span.start, is_output(schema), _picture_names(schema)
    for batch in batches:
        columns = {}
        for index, kind in enumerate(batch.schema):  # by number: a name that nobody asks for may stand twice
            column = batch.column(index)
            array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
            columns[kind.name] = column_values(array, kind, kind.name in pictures)
        names = list(columns)
        for cells in zip(*columns.values(), strict=True) if names else ((),) * batch.num_rows:
            values = dict(zip(names, cells, strict=True))
            raw = Raw(own_id(source, values, span, row), picked(values, wanted))
            if own and values.get("status") == "failed":
                raw.error = f"failed in the step before: {values['error']}"
            elif own and values.get("status") == "duplicate":
                raw.twin = values.get("duplicate_of")
            yield raw
            row += 1


def is_output(schema: pa.Schema) -> bool:
    """Whether a run wrote it: only there do ``status`` and ``error`` say what became of a row in the step before."""
    return {"status", "error"} <= set(schema.names) and b"latentmill" in (schema.metadata or {})


def _read_columns(source: Source, schema: pa.Schema, wanted: Wanted, path: str) -> list[str] | None:
    if wanted is None:
        return None
    needed = list(dict.fromkeys([*wanted.values(), *([source.id] if source.id else [])]))
    missing = [name for name in needed if name not in schema.names]
    lost = [name for name in missing if name == source.id or name in source.columns.values()]
    if lost:
        raise SourceError(f"{path}: has no column {lost[0]!r}; it has {', '.join(schema.names)}")
    needed = [name for name in needed if name not in missing]  # a kept column that this file lacks is null in its rows
    if is_output(schema):
        own = [name for name in ("status", "error", "duplicate_of") if name in schema.names]
        needed += [name for name in own if name not in needed]
    return needed


def _parquet(source: Source, path: str) -> tuple[Any, Any]:
    """The file and its handle: a native one from a disk (see `pipeline.output.parquet`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    handle = open_input(path, source) if "://" in path else pa.OSFile(os.fsencode(path))
    try:
        return pq.ParquetFile(handle, pre_buffer=True), handle
    except (pa.ArrowInvalid, OSError) as error:
        handle.close()
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowInvalid):
            raise
        raise SourceError(f"{path}: is no readable Parquet file ({error}); mend or remove it") from None


def _parquet_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    parquet, handle = _parquet(source, file.path)
    with handle:
        rows = parquet.metadata.num_rows
        size = parquet.metadata.serialized_size
        handle.seek(max(0, file.size - size - 8))
        digest = hashlib.blake2b(handle.read(), digest_size=16).hexdigest()
        schema = _shown(parquet.schema_arrow)
    return FileScan(rows, digest, schema=schema)


def _parquet_schema(source: Source, file: InputFile) -> pa.Schema:
    parquet, handle = _parquet(source, file.path)
    with handle:
        return _shown(parquet.schema_arrow)


_last_group: dict[tuple[Any, ...], pa.Table] = {}


def _parquet_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    parquet, handle = _parquet(source, span.path)
    with handle:
        columns = _read_columns(source, parquet.schema_arrow, wanted, span.path)
        first = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            lo, hi = max(span.start, first), min(span.stop, first + group.num_rows)
            if lo < hi:
                part = Span(span.name, span.path, lo, hi)
                batches = _group_batches(parquet, index, columns, lo - first, hi - lo, span.path)
                yield from _arrow_rows(source, part, wanted, batches, parquet.schema_arrow)
            first += group.num_rows
            if first >= span.stop:
                break


def _group_batches(
    parquet: Any, index: int, columns: list[str] | None, skip: int, count: int, path: str
) -> Iterator[pa.RecordBatch | pa.Table]:
    """Rows ``skip`` to ``skip + count`` of a row group, in batches."""
    group = parquet.metadata.row_group(index)
    if group.total_byte_size <= CACHED_GROUP_BYTES:
        key = (path, index, tuple(columns or ()), group.total_byte_size, group.num_rows)
        table = _last_group.get(key)
        if table is None:
            table = parquet.read_row_group(index, columns=columns)
            _last_group.clear()
            if count < group.num_rows:
                _last_group[key] = table
        for start in range(skip, skip + count, BATCH_ROWS):
            yield table.slice(start, min(BATCH_ROWS, skip + count - start))
        return
    at = 0
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[index], columns=columns):
        lo, hi = max(skip, at), min(skip + count, at + batch.num_rows)
        if lo < hi:
            yield batch.slice(lo - at, hi - lo)
        at += batch.num_rows
        if at >= skip + count:
            return


def _stream(source: Source, path: str) -> tuple[Any, Any]:
    import pyarrow as pa

    try:
        handle = pa.memory_map(path) if "://" not in path else open_input(path, source)
        return pa.ipc.open_stream(handle), handle
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path}: is no Arrow stream as `save_to_disk` writes it ({error})") from None


def _datasets_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    stream, handle = _stream(source, file.path)
    with handle:
        rows, schema = sum(batch.num_rows for batch in stream), _shown(stream.schema)
    return FileScan(rows, file_digest(file), schema=schema)


def _datasets_schema(source: Source, file: InputFile) -> pa.Schema:
    stream, handle = _stream(source, file.path)
    with handle:
        return _shown(stream.schema)


def _datasets_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    stream, handle = _stream(source, span.path)
    with handle:
        columns = _read_columns(source, stream.schema, wanted, span.path)

        def batches() -> Iterator[pa.RecordBatch]:
            at = 0
            for batch in stream:
                lo, hi = max(span.start, at), min(span.stop, at + batch.num_rows)
                if lo < hi:
                    part = batch.slice(lo - at, hi - lo)
                    yield part if columns is None else part.select(columns)
                at += batch.num_rows
                if at >= span.stop:
                    return

        yield from _arrow_rows(source, span, wanted, batches(), stream.schema)


PARQUET = Format(_parquet_scan, _parquet_rows, _parquet_schema)
DATASETS = Format(_datasets_scan, _datasets_rows, _datasets_schema)
