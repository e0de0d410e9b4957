"""A plan on disk: ``plan.json`` (small), ``files.parquet`` (a row a file), ``shards.parquet`` (a row a span)
and, with ``dedupe``, ``duplicates.parquet`` (a row a duplicate).

They lie in the bookkeeping folder of an output; the plan exists once ``plan.json`` does, which is written last, and
names its tables: each planner writes its own (``<run>-shards.parquet``), so that one that was overtaken, and wakes,
puts nothing in the place of the other's. Plans of older code have tables without a run.

A plan with a limit may grow (`pipeline.run.plan.grow_plan`): its next form, ``<run>-plan.g1.json``, has tables of its
own, the same run, and the same shards as far as they went.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input.files import OWN, InputFile, parts
from pipeline.input.rows import FileScan, Pin, Span
from pipeline.input.shards import Shard
from pipeline.output import parquet
from pipeline.output.schema import decode_schema
from pipeline.storage import Folder

PLAN = f"{OWN}/plan.json"
SPANS_A_GROUP = 20_000
_FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("digest", pa.string()),
                    ("rows", pa.int64())])  # fmt: skip
_SPANS = pa.schema([("shard", pa.int64()), ("ids", pa.string()), ("name", pa.string()), ("path", pa.binary()),
                    ("start", pa.int64()), ("stop", pa.int64()), ("offset", pa.int64()),
                    ("ahead", pa.int64())])  # fmt: skip
FILES, SHARDS, TWINS = "files.parquet", "shards.parquet", "duplicates.parquet"
_TABLE = re.compile(rf"([0-9a-f]+)-({FILES}|{SHARDS}|{TWINS})")
_GROWN = re.compile(r"([0-9a-f]+)-plan\.g\d+\.json")
_TWINS = pa.schema([("shard", pa.int64()), ("place", pa.int64()), ("first", pa.string())])


class OutputError(ValueError):
    """The folder is not a run's output, or is damaged; the message says what to do."""


def own_folder(folder: Folder) -> Folder:
    return replace(folder, root=folder.path(OWN))


def load_plan(folder: Folder) -> dict[str, Any] | None:
    """The plan in a folder; None if there is none.

    Raises:
        OutputError: It is damaged.
    """
    plan = _first(folder)
    return None if plan is None else _newest(own_folder(folder), plan)


def _first(folder: Folder) -> dict[str, Any] | None:
    """The plan as it was made, before it grew."""
    try:
        return _read(own_folder(folder), "plan.json")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _newest(folder: Folder, plan: dict[str, Any]) -> dict[str, Any]:
    """A plan of a bookkeeping folder as it has last grown."""
    while run := plan.get("run"):
        try:
            plan = _read(folder, grown_name(run, len(steps(plan))))
        except FileNotFoundError:
            break
    return plan


def _read(folder: Folder, name: str) -> dict[str, Any]:
    try:
        return _plan(folder.read(name))
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(f"{folder.url}/{name} is damaged ({error}); name another output folder") from None


def _plan(content: bytes) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(content)
    decode_schema(plan["schema"])
    parts(plan)
    return plan


def planned_run(folder: Folder) -> str | None:
    """Id of the run whose plan is in a folder: empty for a plan of older code, None if there is no plan."""
    plan = _first(folder)
    return None if plan is None else str(plan.get("run") or "")


def grown_name(run: str, number: int) -> str:
    """Of the file in the bookkeeping folder that holds a plan which has grown so often."""
    return f"{run}-plan.g{number}.json"


def steps(plan: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """How far the plan went each time: ``rows`` and ``shards`` in all, and the run that its tables bear."""
    return plan.get("steps") or [plan]


def table_name(run: str, table: str) -> str:
    return f"{run}-{table}" if run else table


def _named_tables(folder: Folder) -> str:
    """The run that the tables of the plan in a bookkeeping folder bear; empty where they bear none."""
    try:
        return str(_newest(folder, _read(folder, "plan.json")).get("tables") or "")
    except FileNotFoundError:
        return ""


def unfinished(folder: Folder, plan: Mapping[str, Any]) -> list[str]:
    """Tables in the bookkeeping folder of a plan that are not its own: of who died or was overtaken planning; and what
    another plan grew to."""
    names, own = folder.listing(""), {step.get("tables") for step in steps(plan)}
    tables = [name for name in names if (match := _TABLE.fullmatch(name)) and match[1] not in own]
    return tables + [name for name in names if (match := _GROWN.fullmatch(name)) and match[1] != plan.get("run")]


class Tables:
    """The plan's tables while the input is scanned; a context manager that leaves whole files or none.

    Args:
        run: Id of the run, which their names bear.
        twins: There is a table of rows that are duplicates.
    """

    def __init__(self, folder: Folder, run: str = "", twins: bool = False) -> None:
        self._files = _Rows(folder, table_name(run, FILES), _FILES)
        self._spans = _Rows(folder, table_name(run, SHARDS), _SPANS)
        self._twins = _Rows(folder, table_name(run, TWINS), _TWINS) if twins else None

    def file(self, file: InputFile, scan: FileScan) -> None:
        self._files.add((file.name, file.size, file.version, scan.digest, scan.rows))

    def shard(self, shard: Shard) -> None:
        for s in shard.spans:
            path = s.path.encode(errors="surrogateescape")
            self._spans.add((shard.index, shard.ids, s.name, path, s.start, s.stop, s.offset, s.ahead))

    def twin(self, shard: int, place: int, first: str) -> None:
        """A row that holds what the row ``first`` holds; in the order of shards."""
        assert self._twins is not None
        self._twins.add((shard, place, first))

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        for table in filter(None, (self._files, self._spans, self._twins)):
            if kind is None:
                table.close()
            else:
                table.abandon()


class _Rows:
    """A Parquet file written a few thousand tuples at a time."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._upload = folder, name, folder.begin(name)
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
        if self._folder.local:
            self._folder.remove(self._name)


def read_twins(folder: Folder, plan: Mapping[str, Any]) -> Iterator[tuple[int, int, str]]:
    """The duplicates of a plan: shard, place in it, id of the first that holds the same."""
    name = table_name(str(plan.get("tables") or ""), TWINS)
    if folder.exists(name):
        yield from _table_rows(folder, name)


def _table_rows(folder: Folder, name: str) -> Iterator[tuple[Any, ...]]:
    for batch in parquet.batches(folder, name):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def read_files(folder: Folder) -> Iterator[tuple[Any, ...]]:
    """The input's files as the plan saw them: name, size, version, digest, rows."""
    yield from _table_rows(folder, table_name(_named_tables(folder), FILES))


class _Pinned:
    """The files of a plan, found in the order of its spans."""

    def __init__(self, folder: Folder, run: str) -> None:
        self._folder, self._files = folder, _table_rows(folder, table_name(run, FILES))
        self._name: str | None = None
        self._pin = Pin(0, "", "", 0)

    def of(self, name: str) -> Pin:
        while name != self._name:
            row = next(self._files, None)
            if row is None:
                tables = f"{FILES} and {SHARDS} in {self._folder.root}"
                raise OutputError(f"{tables} do not belong together (of {name!r}); name another output folder")
            self._name, self._pin = row[0], Pin(*row[1:])
        return self._pin


def _twins_of(folder: Folder, run: str) -> Callable[[int], dict[int, str]]:
    """Shard -> its duplicates; to be asked in the order of shards."""
    name = table_name(run, TWINS)
    rows = _table_rows(folder, name) if folder.exists(name) else iter(())
    ahead = next(rows, None)

    def twins(index: int) -> dict[int, str]:
        nonlocal ahead
        found: dict[int, str] = {}
        while ahead is not None and ahead[0] <= index:
            if ahead[0] == index:
                found[ahead[1]] = ahead[2]
            ahead = next(rows, None)
        return found

    return twins


def read_shards(folder: Folder, plan: Mapping[str, Any] | None = None) -> Iterator[Shard]:
    """The plan's shards in order, a few thousand spans in memory at a time. Their spans say what the files were.

    Args:
        plan: As it was at some time. None: as it is.

    Raises:
        OutputError: The two tables do not belong together.
    """
    index, ids, spans = -1, None, list[Span]()
    run = _named_tables(folder) if plan is None else str(plan.get("tables") or "")
    pins, twins = _Pinned(folder, run), _twins_of(folder, run)
    for shard, own, name, path, start, stop, offset, *ahead in _table_rows(folder, table_name(run, SHARDS)):
        if shard != index and spans:
            yield Shard(index, tuple(spans), ids, twins(index))
            spans = []
        index, ids = shard, own
        address = path.decode(errors="surrogateescape")
        passed = ahead[0] if ahead else 0  # older plans have no such column
        spans.append(Span(name, address, start, stop, offset, passed, pins.of(name)))
    if spans:
        yield Shard(index, tuple(spans), ids, twins(index))
