"""Arrow tables: Parquet, and datasets as Hugging Face's ``save_to_disk`` writes them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.failures import passing
from pipeline.input.damage import unreadable
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
    field_at,
    file_digest,
    is_picture,
    outer,
    own_id,
    picked,
    picture_type,
)  # fmt: skip
from pipeline.input.source import Damaged, MissingColumn, Source, SourceError
from pipeline.input.streams import open_input

if TYPE_CHECKING:
    import pyarrow as pa

CACHED_GROUP_BYTES = 256 << 20
"""A Parquet row group up to this size is kept while the shards that share it are read one after another."""
BATCH_ROWS, SMALL_ROWS = 1024, 16


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
        try:
            columns = _columns(batch, pictures)
        except UnicodeDecodeError as error:
            if batch.num_rows > 1:
                part, halves = replace(span, start=row, stop=row + batch.num_rows), _halves(batch)
                yield from _arrow_rows(source, part, wanted, halves, schema)
            else:
                yield _lost(source, span, row, _id_of(source, batch), error)
            row += batch.num_rows
            continue
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


def _columns(batch: pa.RecordBatch | pa.Table, pictures: set[str]) -> dict[str, list[Any]]:
    """Column -> its values.

    Raises:
        UnicodeDecodeError: A text is none.
    """
    columns = {}
    for index, kind in enumerate(batch.schema):  # by number: a name that nobody asks for may stand twice
        column = batch.column(index)
        array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
        columns[kind.name] = column_values(array, kind, kind.name in pictures)
    return columns


def _halves(batch: pa.RecordBatch | pa.Table) -> Iterator[pa.RecordBatch | pa.Table]:
    middle = batch.num_rows // 2
    yield from (batch.slice(0, middle), batch.slice(middle))


def _id_of(source: Source, batch: pa.RecordBatch | pa.Table) -> Any:
    """What the user's id column says in the only row of a batch; None if there is none, or if it is damaged itself."""
    try:
        return None if source.id is None else batch[source.id].to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _lost(source: Source, span: Span, row: int, own: Any, error: BaseException) -> Raw:
    """A row that cannot be read.

    Raises:
        Damaged: Nor can its id.
    """
    why = unreadable(span.name, row, row + 1, error)
    if source.id is not None and own is None:
        raise Damaged(f"{why}; nor can its id, so mend the file or leave it out")
    return Raw(own_id(source, {source.id: own} if source.id else {}, span, row), {}, why)


def is_output(schema: pa.Schema) -> bool:
    """Whether a run wrote it: only there do ``status`` and ``error`` say what became of a row in the step before."""
    return {"status", "error"} <= set(schema.names) and b"latentmill" in (schema.metadata or {})


def _read_columns(source: Source, schema: pa.Schema, wanted: Wanted, path: str) -> list[str] | None:
    if wanted is None:
        return None
    needed = list(dict.fromkeys([*wanted.values(), *([source.id] if source.id else [])]))
    missing = [name for name in needed if field_at(schema, name) is None]
    lost = [name for name in missing if name == source.id or name in source.columns.values()]
    if lost:
        raise MissingColumn(path, lost[0], schema.names)
    there = (name for name in needed if name not in missing)  # a kept column that this file lacks is null in its rows
    needed = list(dict.fromkeys(outer(name, schema.names) for name in there))
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
        return pq.ParquetFile(handle, pre_buffer=True, page_checksum_verification=True), handle
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
                yield from _group_rows(parquet, index, columns, part, first, source, wanted)
            first += group.num_rows
            if first >= span.stop:
                break


def _group_rows(
    parquet: Any, index: int, columns: list[str] | None, span: Span, first: int, source: Source, wanted: Wanted
) -> Iterator[Raw]:
    """A span within a row group that begins at row ``first``. Where a page is damaged, its rows up to the group's end
    fail: nothing behind it can be had.
    """
    import pyarrow as pa

    schema, at = parquet.schema_arrow, span.start
    for entered in (_group_batches, _small_batches):
        try:
            part = replace(span, start=at)
            batches = entered(parquet, index, columns, at - first, span.stop - at, span.path)
            for raw in _arrow_rows(source, part, wanted, batches, schema):
                yield raw
                at += 1
            return
        except (pa.ArrowException, OSError) as error:
            if passing(error) or (not isinstance(error, pa.ArrowException) and error.errno not in (None, errno.EIO)):
                raise
            damage = error
    why = unreadable(span.name, at, span.stop, damage)
    for row, own in enumerate(_group_ids(parquet, index, source.id, at - first, span.stop - at, why), at):
        yield Raw(own_id(source, {source.id: own} if source.id else {}, span, row), {}, why)


def _group_ids(parquet: Any, index: int, column: str | None, skip: int, count: int, why: str) -> list[Any]:
    """The user's ids of some rows of a group whose other columns cannot be read; None for each without such a column.

    Raises:
        Damaged: Nor can the ids.
    """
    import pyarrow as pa

    if column is None:
        return [None] * count
    try:
        ids: list[Any] = parquet.read_row_group(index, columns=[column])[column].slice(skip, count).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise Damaged(f"{why}; nor can their ids, so mend the file or leave it out") from None
    return ids


def _small_batches(
    parquet: Any, index: int, columns: list[str] | None, skip: int, count: int, path: str
) -> Iterator[pa.RecordBatch]:
    """Rows of a group a few at a time, so that those before a damaged page are had."""
    small = parquet.iter_batches(batch_size=SMALL_ROWS, row_groups=[index], columns=columns, use_threads=False)
    yield from _between(small, skip, skip + count)


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
    batches = parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[index], columns=columns)
    yield from _between(batches, skip, skip + count)


def _between(batches: Iterable[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows ``start`` to ``stop`` of batches laid end to end; no batch after the last of them is asked for."""
    at = 0
    for batch in batches:
        lo, hi = max(start, at), min(stop, at + batch.num_rows)
        if lo < hi:
            yield batch.slice(lo - at, hi - lo)
        at += batch.num_rows
        if at >= stop:
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
            for part in _between(_undamaged(stream, span.path), span.start, span.stop):
                yield part if columns is None else part.select(columns)

        yield from _arrow_rows(source, span, wanted, batches(), stream.schema)


def _undamaged(stream: Any, path: str) -> Iterator[pa.RecordBatch]:
    """A stream's batches.

    Raises:
        Damaged: From here on it cannot be read.
    """
    import pyarrow as pa

    try:
        yield from stream
    except (pa.ArrowException, OSError) as error:
        if passing(error):
            raise
        raise Damaged(f"{path}: {error}") from None


PARQUET = Format(_parquet_scan, _parquet_rows, _parquet_schema)
DATASETS = Format(_datasets_scan, _datasets_rows, _datasets_schema)
