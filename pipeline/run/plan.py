"""The plan of a run: which rows form which shard, and the fingerprint that a rerun has to match.

A plan is made once, streaming: input files are listed, scanned for their number of rows, and cut into shards of equal
row count, each a few spans of files. Memory does not grow with the number of rows. It is written as ``plan.json``
(small, written last), ``files.parquet`` (a row a file) and ``shards.parquet`` (a row a span).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import StageInfo, StageSpec
from pipeline.input.files import InputFile, list_files, resolve
from pipeline.input.ids import Uniqueness, digest
from pipeline.input.read import read_rows, reader_of, wanted_columns
from pipeline.input.rows import FileScan, Span, Wanted
from pipeline.input.source import Source, SourceError
from pipeline.output import parquet
from pipeline.output import schema as columns_of
from pipeline.run.columns import Watched, look, unused_captions
from pipeline.storage import Folder

SPANS_A_GROUP = 20_000
LINE_IDS = ("parquet", "jsonl", "csv", "text", "datasets", "npy")
"""Formats whose ids, where the user names no column, are ``<file>#<row>``."""
_FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("digest", pa.string()),
                    ("rows", pa.int64())])  # fmt: skip
_SPANS = pa.schema([("shard", pa.int64()), ("ids", pa.string()), ("name", pa.string()), ("path", pa.binary()),
                    ("start", pa.int64()), ("stop", pa.int64()), ("offset", pa.int64())])  # fmt: skip


class PlanError(ValueError):
    """The run cannot be planned; the message says what to change."""


class PlanMismatch(PlanError):
    """The output folder holds a run that was planned differently.

    Attributes:
        fields: Differing field -> (value in the output folder, value now).
    """

    def __init__(self, output: str, fields: Mapping[str, tuple[Any, Any]]) -> None:
        self.output, self.fields = output, dict(fields)
        lines = "\n".join(f"  {name}: was {old!r}, is {new!r}" for name, (old, new) in self.fields.items())
        super().__init__(
            f"{output} holds a run that was planned differently:\n{lines}\n"
            "Change it back to resume, or name another output folder."
        )


@dataclass(frozen=True)
class RunSpec:
    """All that decides which bytes a run writes, and where.

    Attributes:
        stage: The stage that maps the rows.
        source: The input.
        output: Output folder; local, or any fsspec address.
        config: The settings that change the output's bytes (JSON-able). Part of the run fingerprint; the fields
            that differ on a resume are named by their dotted keys. Leave resources and the output folder out.
        seed: Recorded, part of the fingerprint.
        shard_rows: Rows a shard: what one worker takes at a time.
        keep: Columns of a row (names after mapping, else the input's names) copied to the output.
        limit: Only the first so many rows of the input.
        storage_options: fsspec's, for the output. Not recorded.
    """

    stage: StageSpec
    source: Source
    output: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    shard_rows: int = 1000
    keep: tuple[str, ...] = ()
    limit: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. Small: shards are listed lazily from the input's file table.

    Attributes:
        rows: Planned rows.
        shards: Number of shards.
        files: Number of input files.
        input_bytes: Their size (0 for generated rows).
        format: The input's format, found or given.
        columns: Columns that the output will have, in order.
        models: Role -> path, revision, fingerprint (from the stage's description).
        fingerprint: Hex digest over all that changes the bytes.
        estimated_bytes: Rough size of the output before compression, from the columns' types and a sample of the
            kept columns; pictures that the stage makes are guessed at 100 kB.
        notes: What the user should know of the input: what is left out of it, columns that some files lack.
    """

    rows: int
    shards: int
    files: int
    input_bytes: int
    format: str
    columns: tuple[str, ...]
    models: Mapping[str, Mapping[str, str]]
    fingerprint: str
    estimated_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A unit of work: some spans of files.

    Attributes:
        ids: Digest of its ids in order, if they come from the input's content; None: they follow from the spans.
    """

    index: int
    spans: tuple[Span, ...]
    ids: str | None = None

    @property
    def rows(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class Draft:
    """A run's settled description, before its input has been scanned.

    Attributes:
        source: Resolved.
        wanted: What is read of each row.
        schema: The output's, as far as the beginning of the input tells the kept columns' types.
        kept: Names of the columns copied from the input.
        fields: What goes into the fingerprint beside the input's content, by dotted name.
        bytes_per_row: Estimate.
        notes: What the user should know of the input, by what has been seen so far.
    """

    source: Source
    wanted: Wanted
    info: StageInfo
    schema: pa.Schema
    kept: tuple[str, ...]
    fields: Mapping[str, Any]
    bytes_per_row: float
    notes: tuple[str, ...] = ()


# --- what the run is ---------------------------------------------------------------------------------------------


def draft(spec: RunSpec) -> Draft:
    """Settle format, columns and types; reads the first rows of the input and the stage's description.

    Raises:
        SourceError, PlanError
    """
    if spec.shard_rows < 1:
        raise PlanError(f"shard_rows is {spec.shard_rows}; it has to be at least 1")
    source = resolve(spec.source)
    info = spec.stage.describe()
    wanted = wanted_columns(source, spec.keep)
    seen = look(source, spec.keep, spec.limit, info.reads)
    kept = {name: (wanted or {}).get(name, name) for name in spec.keep}
    fields = [seen.field(name, column) for name, column in kept.items()]
    try:
        schema = columns_of.output_schema(fields, info.columns, {"latentmill": _file_note(spec, info)})
    except ValueError as error:
        raise PlanError(str(error)) from None
    size = sum(columns_of.sample_bytes(seen.rows, column) for column in kept.values())
    settled, size = _fields(spec, source, info, schema), size + _row_bytes(info)
    notes = unused_captions(source, seen, info.reads)
    return Draft(source, wanted, info, schema, spec.keep, settled, size, tuple(notes))


def _row_bytes(info: StageInfo) -> float:
    size = 60.0  # id, status, error
    for column in info.columns:
        if column.kind == "tensor":
            values = 1
            for extent in column.shape:
                values *= extent
            size += values * (2 if column.dtype == "float16" else 4)
        else:
            size += {"string": 60, "json": 100, "image": 100_000}.get(column.kind, 8)
    return size


def _file_note(spec: RunSpec, info: StageInfo) -> str:
    """What every file says about where it comes from."""
    models = {role: dict(model) for role, model in info.models.items()}
    note = {"version": columns_of.SCHEMA_VERSION, "stage": spec.stage.target, "seed": spec.seed, "models": models}
    return json.dumps({**note, "metadata": dict(info.metadata), "config": spec.config}, sort_keys=True, default=str)


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _flat(value[key], f"{prefix}.{key}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _fields(spec: RunSpec, source: Source, info: StageInfo, schema: pa.Schema) -> dict[str, Any]:
    """Everything that changes the bytes, but the input's content. A model counts by its fingerprint if it has one."""
    described = source.to_json()
    models = {
        role: {key: value for key, value in model.items() if key != "path" or not model.get("fingerprint")}
        for role, model in info.models.items()
    }
    fields = {
        "shard_rows": spec.shard_rows,
        "limit": spec.limit,
        "seed": spec.seed,
        "keep": list(spec.keep),
        "stage": spec.stage.target,
        "output columns": [f"{f.name}: {f.type}" for f in schema],
        "layout version": columns_of.SCHEMA_VERSION,
        **dict(_flat(spec.config, "config")),
        **dict(_flat({key: value for key, value in described.items() if key != "path"}, "input")),
        "input.path": [file if "://" in file else Folder.at(file).root for file in source.path],
        **dict(_flat(spec.stage.params, "stage")),
        **dict(_flat(models, "models")),
        **dict(_flat(info.metadata, "stage metadata")),
    }
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _watched(drafted: Draft) -> Watched:
    return Watched(drafted.source, drafted.kept, drafted.info.reads)


def fingerprint(fields: Mapping[str, Any], content: str) -> str:
    text = json.dumps({**fields, "input content": content}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ. What the config already says is not said again for the stage's parameters."""
    found = {n: (old.get(n), new.get(n)) for n in [*old, *(n for n in new if n not in old)] if old.get(n) != new.get(n)}
    said = [pair for name, pair in found.items() if name.startswith("config.")]
    return {name: pair for name, pair in found.items() if not (name.startswith("stage.") and pair in said)}


# --- which rows form which shard ------------------------------------------------------------------------------------


@dataclass
class Survey:
    """Running totals while the input is scanned."""

    rows: int = 0
    shards: int = 0
    files: int = 0
    bytes: int = 0
    content: str = ""
    notes: list[str] = field(default_factory=list)


def _file_ids(source: Source, file: InputFile, scan: FileScan | None) -> Iterator[str]:
    """Ids that have to be checked: the user's, or natural keys; else the file's name stands for all of its rows."""
    if source.id is not None:
        span = Span(file.name, file.path, 0, 1 << 62)
        yield from (raw.id for raw in reader_of(source).rows(source, span, {}))
        return
    keys = scan.keys if scan is not None else reader_of(source).scan(source, file, lambda row: False).keys
    yield from keys if keys is not None else (file.name,)


def survey_input(
    source: Source, every: int, limit: int | None, totals: Survey, seen: Callable[[InputFile, FileScan], None],
    columns: Watched | None = None,
) -> Iterator[Shard]:  # fmt: skip
    """Scan a resolved source and cut it into shards; ``totals``, ``seen`` and ``columns`` follow along.

    Raises:
        SourceError: A file cannot be read, or lacks a column; two rows share an id; there are no rows.
    """
    unique, content = Uniqueness(), hashlib.blake2b(digest_size=16)
    spans: list[Span] = []
    ids: list[str] = []
    held = 0
    own_ids = source.id is not None
    for file in list_files(source):
        if limit is not None and totals.rows >= limit:
            break
        begun = totals.rows
        begins = partial(_begins, begun, every)
        left = None if limit is None else limit - begun
        shown = columns.look(left) if columns is not None else None
        scan = reader_of(source).scan(source, file, begins, shown)
        if columns is not None and scan.schema is not None:
            columns.file(file, scan.schema)
        rows = scan.rows if left is None else min(scan.rows, left)
        seen(file, scan)
        content.update(f"{file.name}\0{rows}\0{scan.digest}\n".encode())
        totals.files, totals.bytes = totals.files + 1, totals.bytes + file.size
        checked = _file_ids(source, file, scan)
        row_ids = own_ids or scan.keys is not None
        if not row_ids:
            unique.add(list(checked))
        at = 0
        while at < rows:
            take = min(every - held, rows - at)
            spans.append(Span(file.name, file.path, at, at + take, scan.offsets.get(at, 0)))
            if row_ids:
                fresh = list(islice(checked, take))
                unique.add(fresh)
                ids += fresh
            at, held = at + take, held + take
            totals.rows += take
            if held == every:
                yield Shard(totals.shards, tuple(spans), digest(ids) if ids else None)
                totals.shards += 1
                spans, ids, held = [], [], 0
    if held:
        yield Shard(totals.shards, tuple(spans), digest(ids) if ids else None)
        totals.shards += 1
    if not totals.rows:
        raise SourceError(f"{', '.join(source.path)}: the input has no rows")
    if suspects := unique.suspects():
        _name_duplicates(source, limit, suspects)
    totals.content = content.hexdigest()
    totals.notes += columns.kept.notes() if columns is not None else []


def _begins(begun: int, every: int, row: int) -> bool:
    """Whether a shard of ``every`` rows begins at a row of a file whose first one is row ``begun`` of the input."""
    return (begun + row) % every == 0


def _name_duplicates(source: Source, limit: int | None, suspects: set[int]) -> None:
    """Read the ids again and name the first two rows that share one."""
    places: dict[str, str] = {}
    rows = 0
    for file in list_files(source):
        for row, own in enumerate(_file_ids(source, file, None)):
            if limit is not None and rows >= limit:
                return
            rows += 1
            if int(Uniqueness.hashes([own], 1)[0]) not in suspects:
                continue
            place = f"row {row} of {file.path}"
            if own in places:
                advice = "give every row its own id" if source.id is not None else "name every file once"
                raise SourceError(f"two rows share the id {own!r}: {places[own]} and {place}; {advice}")
            places[own] = place


def make_plan(spec: RunSpec) -> Plan:
    """Plan a run without writing anything (``--dry-run``).

    Raises:
        SourceError: The input cannot be read as described, or two rows share an id (both named).
        PlanError: Columns clash or are missing.
    """
    drafted = draft(spec)
    totals = Survey()
    for _ in survey_input(
        drafted.source, spec.shard_rows, spec.limit, totals, lambda file, scan: None, _watched(drafted)
    ):
        pass
    return _plan(drafted, totals)


def _plan(drafted: Draft, totals: Survey) -> Plan:
    return Plan(
        rows=totals.rows,
        shards=totals.shards,
        files=totals.files,
        input_bytes=totals.bytes,
        format=str(drafted.source.format),
        columns=tuple(drafted.schema.names),
        models=drafted.info.models,
        fingerprint=fingerprint(drafted.fields, totals.content),
        estimated_bytes=int(totals.rows * drafted.bytes_per_row),
        notes=(*drafted.notes, *totals.notes),
    )


# --- the plan on disk -------------------------------------------------------------------------------------------------


def write_plan(spec: RunSpec, drafted: Draft, folder: Folder, created: float) -> dict[str, Any]:
    """Scan the input and write the plan; it exists once ``plan.json`` does.

    Args:
        folder: The bookkeeping folder inside the output folder.

    Returns:
        What ``plan.json`` holds.
    """
    totals, columns = Survey(), _watched(drafted)
    files, spans = _Rows(folder, "files.parquet", _FILES), _Rows(folder, "shards.parquet", _SPANS)

    def seen(file: InputFile, scan: FileScan) -> None:
        files.add((file.name, file.size, file.version, scan.digest, scan.rows))

    try:
        for shard in survey_input(drafted.source, spec.shard_rows, spec.limit, totals, seen, columns):
            for s in shard.spans:
                path = s.path.encode(errors="surrogateescape")
                spans.add((shard.index, shard.ids, s.name, path, s.start, s.stop, s.offset))
    except BaseException:
        files.abandon()
        spans.abandon()
        raise
    files.close()
    spans.close()
    plan = _plan(drafted, totals)
    content = {
        "created": created,
        **asdict(plan),
        "fields": dict(drafted.fields),
        "input_content": totals.content,
        "source": drafted.source.to_json(),
        "stage": {"target": spec.stage.target, "params": dict(spec.stage.params)},
        "config": dict(spec.config),
        "seed": spec.seed,
        "shard_rows": spec.shard_rows,
        "limit": spec.limit,
        "keep": list(spec.keep),
        "stage_columns": [asdict(column) for column in drafted.info.columns],
        "metadata": dict(drafted.info.metadata),
        "reads": drafted.info.reads and dict(drafted.info.reads),
        "schema": columns_of.encode_schema(columns.settled(drafted.schema)),
    }
    folder.write("plan.json", json.dumps(content, indent=1, default=str).encode())
    loaded: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return loaded


class _Rows:
    """A Parquet file written a few thousand tuples at a time."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        self._upload = folder.begin(name)
        self._writer = pq.ParquetWriter(self._upload, schema, compression="zstd")
        self._schema, self._rows = schema, list[tuple[Any, ...]]()

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) >= SPANS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(self._schema)
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._upload.close()

    def abandon(self) -> None:
        self._upload.abandon()


def _table_rows(folder: Folder, name: str) -> Iterator[tuple[Any, ...]]:
    for batch in parquet.batches(folder, name):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def read_shards(folder: Folder) -> Iterator[Shard]:
    """The plan's shards in order, a few thousand spans in memory at a time."""
    index, ids, spans = -1, None, list[Span]()
    for shard, own, name, path, start, stop, offset in _table_rows(folder, "shards.parquet"):
        if shard != index and spans:
            yield Shard(index, tuple(spans), ids)
            spans = []
        index, ids = shard, own
        spans.append(Span(name, path.decode(errors="surrogateescape"), start, stop, offset))
    if spans:
        yield Shard(index, tuple(spans), ids)


def check_input(source: Source, folder: Folder, limit: int | None) -> dict[str, tuple[Any, Any]]:
    """Whether the input is still what the plan saw: differing file -> (then, now); at most a few are named.

    A file whose size and version are the same counts as unchanged; another is scanned again and compared by content.
    """
    found: dict[str, tuple[Any, Any]] = {}
    now = list_files(source)
    for name, size, version, content, rows in _table_rows(folder, "files.parquet"):
        file = next(now, None)
        if file is None or file.name != name:
            found["input.files"] = (name, file.name if file is not None else "(no further file)")
            return found
        if (file.size, file.version) != (size, version):
            scan = reader_of(source).scan(source, file, lambda row: False)
            if (scan.digest, scan.rows) != (content, rows):
                found[f"input file {name}"] = (f"{rows} rows, {size} bytes", f"{scan.rows} rows, {file.size} bytes")
                if len(found) >= 5:
                    return found
    extra = next(now, None)
    if extra is not None and limit is None:
        found["input.files"] = ("(no further file)", extra.name)
    return found


def expected_ids(source: Source, shard: Shard) -> list[str]:
    """The ids of a shard, read from the input (the user's ids) or made from its spans."""
    if shard.ids is None and source.id is None and not source.variants and source.format in LINE_IDS:
        return [f"{span.name}#{row}" for span in shard.spans for row in range(span.start, span.stop)]
    return [raw.id for raw in read_rows(source, shard.spans, 0, shard.rows, {})]
