"""Read rows: one pair of functions a format, ``scan`` (how many rows, where) and ``rows`` (a span of them).

Rows come out with their columns named as the stage wants them. Pictures come out encoded (`Encoded`); they are
fetched and decoded by `prepare`, which may run in another thread. A row that is damaged comes out with ``error`` set.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import numpy as np

from pipeline.concepts import concept_rows, scan_concept
from pipeline.inputs import SUFFIXES, InputFile, printable
from pipeline.pictures import PictureError, decode_picture, encode_picture
from pipeline.source import Source, SourceError
from pipeline.storage import patiently
from pipeline.variants import repeated

if TYPE_CHECKING:
    import pyarrow as pa

CACHED_GROUP_BYTES = 256 << 20
"""A Parquet row group up to this size is kept while the shards that share it are read one after another."""
BATCH_ROWS = 1024
csv.field_size_limit(1 << 27)


@dataclass(slots=True)
class Encoded:
    """A picture as it was found: bytes, or where to get them."""

    data: bytes | None = None
    path: str | None = None


@dataclass(slots=True)
class Raw:
    """A row before its pictures are decoded."""

    id: str
    values: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` of one file; ``offset``: the byte where row ``start`` begins, where that helps."""

    name: str
    path: str
    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True)
class FileScan:
    """What a scan found: number of rows, a digest of what they are, byte offsets of the rows that begin shards.

    ``keys``: the rows' natural keys where the format has them (ids derive from them and have to be checked).
    """

    rows: int
    digest: str
    offsets: Mapping[int, int] = field(default_factory=dict)
    keys: tuple[str, ...] | None = None


Wanted = Mapping[str, str] | None
"""Name in the row -> name in the input; None: everything."""
Begins = Callable[[int], bool]
"""Whether a shard begins at this row of the file."""


@dataclass(frozen=True)
class Format:
    """How one format is read. ``schema`` gives the columns with their types, where the files tell."""

    scan: Callable[[Source, InputFile, Begins], FileScan]
    rows: Callable[[Source, Span, Wanted], Iterator[Raw]]
    schema: Callable[[Source, InputFile], pa.Schema | None]


def open_input(path: str, source: Source) -> IO[bytes]:
    """Open an input file for reading, decompressed if its name says that it is compressed."""
    if "://" not in path and not path.endswith((".gz", ".bz2", ".xz", ".zst")):
        return open(path, "rb")
    return patiently(lambda: fsspec.open(path, "rb", compression="infer", **source.storage_options).open())


def _file_digest(file: InputFile) -> str:
    return f"{file.size}:{file.version}"


def _derived(span_name: str, row: int) -> str:
    return f"{span_name}#{row}"


def _pick(values: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    return dict(values) if wanted is None else {name: values.get(column) for name, column in wanted.items()}


def _own_id(source: Source, values: Mapping[str, Any], span: Span, row: int) -> str:
    if source.id is None:
        return _derived(span.name, row)
    value = values.get(source.id)
    if value is None or value == "":
        raise SourceError(f"{span.name}, row {row}: the id column {source.id!r} is empty; every row needs an id")
    return str(value)


# --- lines: text, JSONL, CSV --------------------------------------------------------------------------------------


def _check_encoding(file: InputFile, first: bytes) -> None:
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(f"{file.path}: is UTF-16; convert it to UTF-8 first")


def _lines(source: Source, path: str, offset: int) -> Iterator[bytes]:
    with open_input(path, source) as handle:
        if offset:
            handle.seek(offset)
        yield from handle


def _scan_lines(source: Source, file: InputFile, begins: Begins, blank: bool) -> FileScan:
    digest, offsets, rows, position = hashlib.blake2b(digest_size=16), {}, 0, 0
    for line in _lines(source, file.path, 0):
        if not position:
            _check_encoding(file, line[:2])
        digest.update(line)
        if blank or line.strip():
            if begins(rows):
                offsets[rows] = position
            rows += 1
        position += len(line)
    return FileScan(rows, digest.hexdigest(), offsets)


def _text(line: bytes, first: bool) -> str:
    if first and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    return line.rstrip(b"\n").removesuffix(b"\r").decode()


def _text_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    names = ["text"] if wanted is None else [name for name, column in wanted.items() if column == "text"]
    prefix = span.name + "#"
    for row, line in enumerate(islice(_lines(source, span.path, span.offset), span.stop - span.start), span.start):
        try:
            text = _text(line, row == 0)
        except UnicodeDecodeError as error:
            yield Raw(prefix + str(row), {}, f"line {row + 1} of {span.name} is not UTF-8: {error.reason}")
            continue
        yield Raw(prefix + str(row), dict.fromkeys(names, text))


def _jsonl_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    lines = (line for line in _lines(source, span.path, span.offset) if line.strip())
    for row, line in enumerate(islice(lines, span.stop - span.start), span.start):
        try:
            values = json.loads(_text(line, row == 0))
        except (ValueError, RecursionError) as error:
            problem = f"row {row} of {span.name} is not JSON: {error}"
        else:
            problem = "" if isinstance(values, dict) else f"row {row} of {span.name} is no JSON object"
        if not problem:
            yield Raw(_own_id(source, values, span, row), _pick(values, wanted))
        elif source.id is None:
            yield Raw(_derived(span.name, row), {}, problem)
        else:
            raise SourceError(f"{problem}, so its id {source.id!r} cannot be read; mend or remove the line")


def _jsonl_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    first = next((line for line in _lines(source, file.path, 0) if line.strip()), b"")
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        raise SourceError(f"{file.path}: is a JSON array; write one JSON object a line (JSONL) instead")
    return _scan_lines(source, file, begins, blank=False)


class _Counted:
    """Lines of a CSV file as text, counting the bytes handed out so far."""

    def __init__(self, lines: Iterator[bytes], position: int) -> None:
        self._lines, self.position = lines, position

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if not self.position and line.startswith(b"\xef\xbb\xbf"):
            self.position, line = 3, line[3:]
        self.position += len(line)
        return line.decode(errors="surrogateescape")


def _csv_header(source: Source, path: str) -> tuple[list[str], str, int]:
    """Column names, the delimiter, and the byte after the header."""
    lines = _lines(source, path, 0)
    counted = _Counted(lines, 0)
    try:
        first = next(counted)
    except StopIteration:
        return [], ",", 0
    counts = {sign: first.count(sign) for sign in ",;\t"}
    delimiter = max(counts, key=lambda sign: counts[sign]) if any(counts.values()) else ","
    counted = _Counted(_lines(source, path, 0), 0)
    names = next(csv.reader(counted, delimiter=delimiter))
    return names, delimiter, counted.position


def _csv_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    _, delimiter, start = _csv_header(source, file.path)
    digest, offsets, rows = hashlib.blake2b(digest_size=16), {}, 0

    def hashed() -> Iterator[bytes]:
        for count, line in enumerate(_lines(source, file.path, 0)):
            if not count:
                _check_encoding(file, line[:2])
            digest.update(line)
            yield line

    counted = _Counted(hashed(), 0)
    before = 0
    try:
        for cells in csv.reader(counted, delimiter=delimiter):
            if before >= start and cells:
                if begins(rows):
                    offsets[rows] = before
                rows += 1
            before = counted.position
    except csv.Error as error:
        raise SourceError(f"{file.path}, after row {rows}: {error}; is a quote left open?") from None
    return FileScan(rows, digest.hexdigest(), offsets)


def _csv_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    names, delimiter, start = _csv_header(source, span.path)
    counted = _Counted(_lines(source, span.path, span.offset or start), span.offset or start)
    cells_of = (cells for cells in csv.reader(counted, delimiter=delimiter) if cells)
    for row, cells in enumerate(islice(cells_of, span.stop - span.start), span.start):
        problem = None
        if len(cells) != len(names):
            problem = f"row {row} of {span.name} has {len(cells)} cells, the header has {len(names)}"
        elif not all(cell.isprintable() or _valid(cell) for cell in cells):
            problem = f"row {row} of {span.name} is not UTF-8"
        values = dict(zip(names, cells, strict=False))
        if problem is None:
            yield Raw(_own_id(source, values, span, row), _pick(values, wanted))
        else:
            yield Raw(_own_id(source, values, span, row), {}, problem)


def _valid(text: str) -> bool:
    """Whether text decoded with surrogate escapes was UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- Arrow: Parquet, datasets saved to disk ------------------------------------------------------------------------


def _is_picture(field: pa.Field) -> bool:
    import pyarrow as pa

    kind = field.type
    return pa.types.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"}


def _picture_names(schema: pa.Schema) -> set[str]:
    """Columns that hold pictures: by their type, or because the ``huggingface`` metadata says so."""
    names = {field.name for field in schema if _is_picture(field)}
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw:
        features = (json.loads(raw).get("info") or {}).get("features") or {}
        names |= {name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"}
    return names & set(schema.names)


def as_encoded(value: Any) -> Encoded:
    """A picture in any of the forms that inputs have it in: bytes, a path, a struct of both, nothing."""
    if value is None or isinstance(value, Encoded):
        return value or Encoded()
    if isinstance(value, Mapping):
        return Encoded(value.get("bytes"), value.get("path"))
    if isinstance(value, str):
        return Encoded(None, value)
    return Encoded(bytes(value))


def column_values(array: pa.Array, field: pa.Field, picture: bool = False) -> list[Any]:
    """An Arrow column as Python values: pictures as `Encoded`, lists of numbers as numpy arrays.

    An array whose field says so (``shape`` in its metadata, or a fixed-shape tensor type) gets its shape back.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, shape = field.type, None
    if isinstance(kind, pa.BaseExtensionType):
        shape = getattr(kind, "shape", None)
        array, kind = array.storage, kind.storage_type
    if picture:
        return [as_encoded(value) for value in array.to_pylist()]
    listed = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not listed or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        return array.to_pylist()
    noted = (field.metadata or {}).get(b"shape")
    if noted:
        shape = tuple(json.loads(noted))
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    values = []
    for end, length, there in zip(ends, lengths, valid, strict=True):
        value = flat[end - length : end] if there else None
        values.append(value.reshape(shape) if value is not None and shape and value.size == np.prod(shape) else value)
    return values


def _arrow_rows(
    source: Source, span: Span, wanted: Wanted, batches: Iterator[pa.RecordBatch | pa.Table], pictures: set[str]
) -> Iterator[Raw]:
    row = span.start
    for batch in batches:
        columns = {}
        for kind in batch.schema:
            column = batch.column(kind.name)
            array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
            columns[kind.name] = column_values(array, kind, kind.name in pictures)
        names = list(columns)
        for cells in zip(*columns.values(), strict=True) if names else ((),) * batch.num_rows:
            values = dict(zip(names, cells, strict=True))
            picked = _pick(values, wanted)
            raw = Raw(_own_id(source, values, span, row), picked)
            if values.get("status") == "failed" and "error" in values:
                raw.error = f"failed in the step before: {values['error']}"
            yield raw
            row += 1


def _read_columns(source: Source, schema: pa.Schema, wanted: Wanted, path: str) -> list[str] | None:
    if wanted is None:
        return None
    needed = list(dict.fromkeys([*wanted.values(), *([source.id] if source.id else [])]))
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise SourceError(f"{path}: has no column {missing[0]!r}; it has {', '.join(schema.names)}")
    if {"status", "error"} <= set(schema.names) and b"latentmill" in (schema.metadata or {}):
        needed += [name for name in ("status", "error") if name not in needed]
    return needed


def _parquet(source: Source, path: str) -> tuple[Any, IO[bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    handle = open_input(path, source)
    try:
        return pq.ParquetFile(handle, pre_buffer=True), handle
    except (pa.ArrowInvalid, OSError) as error:
        handle.close()
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowInvalid):
            raise
        raise SourceError(f"{path}: is no readable Parquet file ({error}); mend or remove it") from None


def _parquet_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    parquet, handle = _parquet(source, file.path)
    with handle:
        rows = parquet.metadata.num_rows
        size = parquet.metadata.serialized_size
        handle.seek(max(0, file.size - size - 8))
        digest = hashlib.blake2b(handle.read(), digest_size=16).hexdigest()
    return FileScan(rows, digest)


def _parquet_schema(source: Source, file: InputFile) -> pa.Schema:
    parquet, handle = _parquet(source, file.path)
    with handle:
        return parquet.schema_arrow


_last_group: dict[tuple[Any, ...], pa.Table] = {}


def _parquet_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    parquet, handle = _parquet(source, span.path)
    with handle:
        columns = _read_columns(source, parquet.schema_arrow, wanted, span.path)
        pictures = _picture_names(parquet.schema_arrow)
        first = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            lo, hi = max(span.start, first), min(span.stop, first + group.num_rows)
            if lo < hi:
                part = Span(span.name, span.path, lo, hi)
                batches = _group_batches(parquet, index, columns, lo - first, hi - lo, span.path)
                yield from _arrow_rows(source, part, wanted, batches, pictures)
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


def _datasets_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    stream, handle = _stream(source, file.path)
    with handle:
        return FileScan(sum(batch.num_rows for batch in stream), _file_digest(file))


def _datasets_schema(source: Source, file: InputFile) -> pa.Schema:
    stream, handle = _stream(source, file.path)
    with handle:
        return stream.schema


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

        yield from _arrow_rows(source, span, wanted, batches(), _picture_names(stream.schema))


# --- pictures: folders and tars --------------------------------------------------------------------------------------


def _images_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    return FileScan(1, _file_digest(file), keys=(file.name,))


def _images_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    values: dict[str, Any] = {"image": Encoded(None, span.path), "path": span.name}
    if wanted is not None and "text" in wanted.values():
        values["text"] = _sidecar(source, span.path)
    yield Raw(span.name, _pick(values, wanted))


def _sidecar(source: Source, path: str) -> str | None:
    """The caption in ``picture.txt`` beside ``picture.jpg``, if there is one."""
    stem = path[: -len(PurePosixPath(path).suffix)]
    try:
        with open_input(stem + ".txt", source) as handle:
            return handle.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def _split_key(member: str) -> tuple[str, str]:
    """``a/b.seg.png`` -> (``a/b``, ``seg.png``): the key ends at the first dot of the last part."""
    folder, slash, base = printable(member).rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, int, list[tarfile.TarInfo]]]:
    """Runs of members with the same key: key, offset of the first header, members. Nothing is ever unpacked to disk."""
    key, start, members = "", 0, list[tarfile.TarInfo]()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else a big tar's headers pile up
        if not member.isfile():
            continue
        found, extension = _split_key(member.name)
        if not extension:
            continue
        if members and found != key:
            yield key, start, members
            members = []
        if not members:
            key, start = found, member.offset
        members.append(member)
    if members:
        yield key, start, members


def _open_tar(source: Source, path: str, offset: int) -> tuple[tarfile.TarFile, IO[bytes]]:
    handle = open_input(path, source)
    handle.seek(offset)
    try:
        return tarfile.open(fileobj=handle, mode="r:gz" if path.endswith(".tgz") else "r:"), handle
    except tarfile.TarError as error:
        handle.close()
        raise SourceError(f"{path}: is no readable tar ({error})") from None


def _webdataset_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    tar, handle = _open_tar(source, file.path, 0)
    digest, offsets, keys = hashlib.blake2b(digest_size=16), {}, list[str]()
    with handle, tar:
        try:
            for key, start, members in _groups(tar):
                if begins(len(keys)):
                    offsets[len(keys)] = start
                keys.append(f"{file.name}/{key}")
                for member in members:
                    digest.update(f"{member.name}\0{member.size}\0{member.mtime}\n".encode(errors="surrogateescape"))
        except (tarfile.TarError, EOFError, OSError) as error:
            last = f" after {keys[-1]}" if keys else ""
            problem = f"{file.path}: the tar is damaged{last} ({error}); fetch it again or leave it out"
            raise SourceError(problem) from None
    return FileScan(len(keys), digest.hexdigest(), offsets, tuple(keys))


def _webdataset_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    tar, handle = _open_tar(source, span.path, span.offset)
    with handle, tar:
        for row, (key, _, members) in enumerate(islice(_groups(tar), span.stop - span.start), span.start):
            derived = f"{span.name}/{key}"
            values: dict[str, Any] = {"__key__": key}
            problem = None
            for member in members:
                extension = _split_key(member.name)[1]
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                try:
                    _member(values, extension, data)
                except ValueError as error:
                    problem = problem or f"{member.name} in {span.name}: {error}"
            own = derived if source.id is None else _own_id(source, values, span, row)
            yield Raw(own, _pick(values, wanted), problem)


def _member(values: dict[str, Any], extension: str, data: bytes) -> None:
    """Add a tar member's content under its extension, and under ``image``, ``text`` or its own keys."""
    last = extension.rpartition(".")[2]
    if "." + last in SUFFIXES["images"]:
        values[extension] = Encoded(data)
        values.setdefault("image", values[extension])
    elif last in ("txt", "text", "caption", "cls"):
        values[extension] = data.decode()
        if last != "cls":
            values.setdefault("text", values[extension])
    elif last == "json":
        content = json.loads(data)
        values[extension] = content
        for name, value in content.items() if isinstance(content, dict) else ():
            values.setdefault(name, value)
    elif last == "npy":
        import io

        values[extension] = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        values[extension] = data


# --- numpy arrays, generated rows ------------------------------------------------------------------------------------


def _npy_header(handle: IO[bytes], path: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, byte offset of the first value."""
    try:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(handle)
    except ValueError as error:
        raise SourceError(f"{path}: is no .npy file ({error})") from None
    if fortran or dtype.hasobject or len(shape) < 2:
        raise SourceError(f"{path}: needs a C-ordered numeric array with a row a sample; it holds {dtype} {shape}")
    return shape, dtype, handle.tell()


def _npy_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    with open_input(file.path, source) as handle:
        shape, dtype, start = _npy_header(handle, file.path)
    needed = start + int(np.prod(shape)) * dtype.itemsize
    if file.size < needed:
        raise SourceError(f"{file.path}: is cut short ({file.size} bytes, its header promises {needed})")
    return FileScan(shape[0], _file_digest(file))


def _npy_schema(source: Source, file: InputFile) -> pa.Schema:
    import pyarrow as pa

    with open_input(file.path, source) as handle:
        shape, dtype, _ = _npy_header(handle, file.path)
    size = int(np.prod(shape[1:]))
    note = {"shape": json.dumps(list(shape[1:])), "dtype": str(dtype)}
    return pa.schema([pa.field("embedding", pa.list_(pa.from_numpy_dtype(dtype), size), metadata=note)])


def _npy_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    with open_input(span.path, source) as handle:
        shape, dtype, start = _npy_header(handle, span.path)
        width = int(np.prod(shape[1:]))
        handle.seek(start + span.start * width * dtype.itemsize)
        for first in range(span.start, span.stop, BATCH_ROWS):
            count = min(BATCH_ROWS, min(span.stop, shape[0]) - first)
            if count <= 0:
                return
            block = np.frombuffer(handle.read(count * width * dtype.itemsize), dtype).reshape(count, *shape[1:])
            for row, value in enumerate(block, first):
                yield Raw(_derived(span.name, row), _pick({"embedding": value}, wanted))


def _world(address: str) -> tuple[str, int, int]:
    """``micro-world://heldout?rows=64&seed=0`` -> split, rows, seed."""
    parts = urlsplit(address)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    unknown = set(query) - {"rows", "seed"}
    if parts.netloc not in ("train", "heldout") or unknown or not query.get("rows", "64").isdecimal():
        raise SourceError(f"{address}: expected micro-world://train?rows=N&seed=N, or heldout in place of train")
    return parts.netloc, int(query.get("rows", "64")), int(query.get("seed", "0"))


def _world_scan(source: Source, file: InputFile, begins: Begins) -> FileScan:
    split, rows, seed = _world(file.path)
    return FileScan(rows, f"micro-world:{split}:{seed}:{rows}")


def _world_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    from PIL import Image

    from micro.world import caption_of, render, sample_scene

    split, _, seed = _world(span.path)
    names = set(wanted.values()) if wanted is not None else {"image", "caption", "scene"}
    for index in range(span.start, span.stop):
        scene = sample_scene(index, split, seed)  # type: ignore[arg-type]
        values: dict[str, Any] = {"caption": caption_of(index, split, seed), "scene": scene.to_json()}  # type: ignore[arg-type]
        if "image" in names:
            values["image"] = Encoded(encode_picture(Image.fromarray(render(scene))))
        yield Raw(f"{split}-{seed}#{index}", _pick(values, wanted))


# --- the table -------------------------------------------------------------------------------------------------------


def _fixed(**columns: str) -> Callable[[Source, InputFile], pa.Schema]:
    def schema(source: Source, file: InputFile) -> pa.Schema:
        import pyarrow as pa

        types = {"string": pa.string(), "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
        return pa.schema([(name, types[kind]) for name, kind in columns.items()])

    return schema


def _csv_schema(source: Source, file: InputFile) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in _csv_header(source, file.path)[0]])


def _untold(source: Source, file: InputFile) -> None:
    """The files do not say: types come from a sample of rows."""


FORMATS: dict[str, Format] = {
    "parquet": Format(_parquet_scan, _parquet_rows, _parquet_schema),
    "jsonl": Format(_jsonl_scan, _jsonl_rows, _untold),
    "csv": Format(_csv_scan, _csv_rows, _csv_schema),
    "text": Format(partial(_scan_lines, blank=True), _text_rows, _fixed(text="string")),
    "images": Format(_images_scan, _images_rows, _fixed(image="image", path="string", text="string")),
    "webdataset": Format(_webdataset_scan, _webdataset_rows, _untold),
    "datasets": Format(_datasets_scan, _datasets_rows, _datasets_schema),
    "npy": Format(_npy_scan, _npy_rows, _npy_schema),
    "concepts": Format(scan_concept, concept_rows, _untold),
    "micro-world": Format(_world_scan, _world_rows, _fixed(image="image", caption="string", scene="string")),
}


def reader_of(source: Source) -> Format:
    """How a resolved source is read."""
    assert source.format is not None
    format = FORMATS[source.format]
    for name, values in source.variants.items():
        format = repeated(format, name, values)
    return format


def wanted_columns(source: Source, keep: tuple[str, ...]) -> Wanted:
    """What has to be read for a stage and the kept columns."""
    if not source.columns:
        return None
    kept = {name: name for name in keep if name not in source.columns and name not in source.variants}
    return {**source.columns, **kept}


def read_rows(source: Source, spans: tuple[Span, ...], skip: int, count: int, wanted: Wanted) -> Iterator[Raw]:
    """Rows ``skip`` to ``skip + count`` of the spans laid end to end.

    Args:
        source: Resolved.
    """
    read = reader_of(source).rows
    for span in spans:
        size = span.stop - span.start
        if skip >= size:
            skip -= size
            continue
        found = 0
        for raw in islice(read(source, span, wanted), skip, min(size, skip + count)):
            found += 1
            yield raw
        if found < min(size - skip, count):
            gone = span.start + skip + found
            raise SourceError(f"{span.path}: row {gone} and what follows are gone; the input changed during the run")
        count -= found
        skip = 0
        if not count:
            return


def prepare(raw: Raw, source: Source, folder: str) -> tuple[dict[str, Any] | None, str | None]:
    """A row as the stage gets it, its pictures decoded: (row, None), or (None, why not).

    Columns that are only kept are left out: the stage has no use for them, and a damaged picture in one is no reason to
    fail the row.

    Args:
        folder: Of the row's file; relative picture paths start there.
    """
    if raw.error is not None:
        return None, raw.error
    row: dict[str, Any] = {"id": raw.id}
    for name, value in raw.values.items():
        if name == "id" or (source.columns and name not in source.columns and name not in source.variants):
            continue
        if name in source.images:
            value = as_encoded(value)
        if isinstance(value, Encoded):
            try:
                row[name] = decode_picture(picture_bytes(value, source, folder), source.max_pixels)
            except PictureError as error:
                return None, f"{name}: {error}"
        else:
            row[name] = value
    return row, None


def picture_bytes(value: Encoded, source: Source, folder: str) -> bytes:
    """The encoded bytes of a picture, fetched if only its place is known. They are kept on ``value``.

    Raises:
        PictureError: The file is not there, or there is neither bytes nor path.
    """
    if value.data is None:
        if not value.path:
            raise PictureError("no picture (null)")
        path = value.path if "://" in value.path or value.path.startswith("/") else f"{folder}/{value.path}"
        try:
            with open_input(path, source) as handle:
                value.data = patiently(handle.read)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise PictureError(f"{path}: {error.strerror or 'cannot be read'}") from None
    return value.data
