"""numpy arrays with a row a sample, such as clip-retrieval writes: the column ``embedding``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import numpy as np

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
    file_digest,
    picked,
)
from pipeline.input.source import Damaged, Source, SourceError
from pipeline.input.streams import open_input

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS, LONGEST_ROW = 1024, 1 << 31


def _npy_header(handle: IO[bytes], path: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, byte offset of the first value."""
    try:
        shape, fortran, dtype = read_header(handle)
    except ValueError as error:
        raise SourceError(f"{path}: is no .npy file ({error})") from None
    if fortran or dtype.hasobject or len(shape) < 2:
        raise SourceError(f"{path}: needs a C-ordered numeric array with a row a sample; it holds {dtype} {shape}")
    if not 0 < math.prod(shape[1:]) < LONGEST_ROW:
        raise SourceError(f"{path}: holds no rows that can be kept, {dtype} {shape}")
    return shape, dtype, handle.tell()


def read_header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, dtype; the handle stands at the first value then.

    Raises:
        ValueError: It is no header of numpy's, or none of an array that can be.
    """
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(handle)
    except OSError:
        raise
    except Exception as error:  # numpy parses it as Python, and lets some of what that raises through
        raise ValueError(error) from None
    if min(shape, default=1) < 0:
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype


def _npy_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    with open_input(file.path, source) as handle:
        shape, dtype, start = _npy_header(handle, file.path)
    needed = start + math.prod(shape) * dtype.itemsize
    if file.size < needed:
        raise SourceError(f"{file.path}: is cut short ({file.size} bytes, its header promises {needed})")
    return FileScan(shape[0], file_digest(file), schema=_schema(shape, dtype))


def _npy_schema(source: Source, file: InputFile) -> pa.Schema:
    with open_input(file.path, source) as handle:
        shape, dtype, _ = _npy_header(handle, file.path)
    return _schema(shape, dtype)


def _schema(shape: tuple[int, ...], dtype: np.dtype) -> pa.Schema:
    import pyarrow as pa

    size = math.prod(shape[1:])
    note = {"shape": json.dumps(list(shape[1:])), "dtype": str(dtype)}
    return pa.schema([pa.field("embedding", pa.list_(pa.from_numpy_dtype(dtype), size), metadata=note)])


def _npy_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    with open_input(span.path, source) as handle:
        shape, dtype, start = _npy_header(handle, span.path)
        width = math.prod(shape[1:])
        handle.seek(start + span.start * width * dtype.itemsize)
        for first in range(span.start, span.stop, BATCH_ROWS):
            count = min(BATCH_ROWS, min(span.stop, shape[0]) - first)
            if count <= 0:
                return
            data = handle.read(count * width * dtype.itemsize)
            if len(data) < count * width * dtype.itemsize:
                raise Damaged(f"{span.path}: ends early")
            block = np.frombuffer(data, dtype).reshape(count, *shape[1:])
            for row, value in enumerate(block, first):
                yield Raw(derived_id(span.name, row), picked({"embedding": value}, wanted))


NPY = Format(_npy_scan, _npy_rows, _npy_schema)
