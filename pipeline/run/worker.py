"""A worker: holds a stage, maps one shard after another through it, commits each. Knows no Ray.

Beside the thread that drives the stage, one thread reads rows, some decode pictures, some encode them, and one writes:
the device waits for none of them. Rows come back from the stage in any order and are written in the input's.
"""

from __future__ import annotations

import gc
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contract import Column, Form, Row, StageSpec, failed
from pipeline.input.forms import FormError, as_picture, short
from pipeline.input.pictures import PictureError, encode_picture
from pipeline.input.read import picture_bytes, prepare, read_rows
from pipeline.input.rows import Encoded, Raw, Span, Wanted
from pipeline.input.source import Source
from pipeline.output import commit, parquet
from pipeline.output.commit import Record
from pipeline.output.schema import decode_schema, kept_value, measures, merge_measures, picture_columns, table
from pipeline.storage import Folder

T = TypeVar("T")
GROUP_ROWS = 4096
GROUP_PICTURES = 256
CHUNK_ROWS = 256
CHUNK_PICTURES = 4
UNWRITTEN = 2
"""Groups of rows that may wait for the writer before the stage is held back."""
AHEAD = 4
"""Chunks read and decoded ahead of the stage, for each decoding thread."""


class ContractError(RuntimeError):
    """The stage broke its contract (an id it was not given, a row given back twice): no data can be trusted."""


class Poisoned(RuntimeError):
    """The device refuses all further work in this process; only a new process helps."""


@dataclass(frozen=True)
class WorkerJob:
    """All a worker has to know, once.

    Attributes:
        schema: The output's, encoded by `pipeline.output.schema.encode_schema`.
        reads: Which columns the stage takes, and in which form; None: all, as they are found.
        measured: Numeric columns of the stage.
    """

    stage: StageSpec
    source: Source
    wanted: Wanted
    kept: tuple[str, ...]
    schema: str
    columns: tuple[Column, ...]
    output: str
    storage_options: Mapping[str, Any]
    reads: Mapping[str, Form] | None = None
    decode_threads: int = 2
    encode_threads: int = 2

    @property
    def measured(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.columns if c.kind in ("int64", "float32", "float64", "bool"))


@dataclass(frozen=True)
class Piece:
    """Some rows of a shard that were written by themselves, because the shard as a whole killed its workers."""

    start: int
    stop: int
    file: str
    size: int
    checksum: str
    ok: int
    failed: int
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    summary: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Rows ``start`` to ``stop`` of a shard.

    Attributes:
        spans: The whole shard's.
        whole: Commit the shard; else write a piece.
        condemned: Why this (single) row must not be given to the stage any more.
        pieces: Put these together and commit the shard.
    """

    shard: int
    spans: tuple[Span, ...]
    start: int
    stop: int
    whole: bool = True
    condemned: str | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass
class _Waiting:
    """A row inside the stage."""

    position: int
    row: Row
    kept: dict[str, Any]


class _Feed:
    """What the stage iterates over: decoded rows, remembered until they come back. Its errors are not the stage's."""

    def __init__(self, chunks: Iterator[list[tuple[Row, _Waiting]]]) -> None:
        self._chunks, self._ready = chunks, list[tuple[Row, _Waiting]]()
        self.inside: dict[str, _Waiting] = {}
        self.error: BaseException | None = None
        self.exhausted = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> Row:
        while not self._ready:
            try:
                chunk = next(self._chunks)
            except StopIteration:
                self.exhausted = True
                raise
            except BaseException as error:
                self.error = error
                raise
            self._ready = chunk[::-1]
        row, waiting = self._ready.pop()
        if row["id"] in self.inside:
            problem = f"two rows of one shard have the id {row['id']!r}; the input changed during the run"
            self.error = ContractError(problem)
            raise self.error
        self.inside[row["id"]] = waiting
        return row


def ahead(items: Iterable[T], limit: int) -> Iterator[T]:
    """Iterate in a thread of its own, up to ``limit`` items ahead of the consumer."""
    buffer: queue.Queue[Any] = queue.Queue(limit)
    end, stopped = object(), threading.Event()
    problem: list[BaseException] = []

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                buffer.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            problem.append(error)
        put(end)

    thread = threading.Thread(target=work, daemon=True, name="latentmill-read")
    thread.start()
    try:
        while (item := buffer.get()) is not end:
            yield item
        if problem:
            raise problem[0]
    finally:
        stopped.set()
        thread.join()


class Worker:
    """Builds the stage; `process` may then be called any number of times, from one thread."""

    def __init__(self, job: WorkerJob) -> None:
        begun = time.monotonic()
        self.job = job
        self.schema = decode_schema(job.schema)
        self._pictures = picture_columns(self.schema)
        self._kept = frozenset(job.kept)
        self._folder = Folder.at(job.output, job.storage_options)
        pa.array([None])  # imports pandas, if there is one: a third of a second that no shard has to pay
        self.stage = job.stage.build()
        self.build_seconds = time.monotonic() - begun
        self._decoders = ThreadPoolExecutor(max(1, job.decode_threads), "latentmill-decode")
        self._encoders = ThreadPoolExecutor(max(1, job.encode_threads), "latentmill-encode")
        self._writer = ThreadPoolExecutor(1, "latentmill-write")
        pictured = bool(job.source.images) or "picture" in (job.reads or {}).values()
        self._slow_rows = pictured or job.source.format in ("images", "webdataset", "micro-world")
        self.done = 0
        """Rows of the current task that are through the stage; read by another thread."""

    # --- rows in ----------------------------------------------------------------------------------------------------

    def _decode(self, raws: list[tuple[int, Raw, str]]) -> list[tuple[int, Raw, dict[str, Any] | None, str | None]]:
        decoded = []
        for position, raw, folder in raws:
            try:
                row, problem = prepare(raw, self.job.source, folder, self.job.reads)
            except Exception as error:  # whatever a decoder throws is this row's trouble alone
                row, problem = None, f"cannot be decoded: {type(error).__name__}: {error}"
            decoded.append((position, raw, row, problem and short(problem)))
        return decoded

    def _raws(self, task: Task) -> Iterator[list[tuple[int, Raw, str]]]:
        """Chunks of rows as they were found, with the folder that their pictures' paths are relative to."""
        size = CHUNK_PICTURES if self._slow_rows else CHUNK_ROWS
        chunk: list[tuple[int, Raw, str]] = []
        rows = read_rows(self.job.source, task.spans, task.start, task.stop - task.start, self.job.wanted)
        folders = _folders(task)
        for position, raw in enumerate(rows, task.start):
            if any(isinstance(value, Encoded) for value in raw.values.values()):
                size = CHUNK_PICTURES
            chunk.append((position, raw, folders(position)))
            if len(chunk) >= size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _decoded(self, task: Task) -> Iterator[list[tuple[int, Raw, dict[str, Any] | None, str | None]]]:
        submitted = (self._decoders.submit(self._decode, chunk) for chunk in self._raws(task))
        for chunk in ahead(submitted, AHEAD * max(1, self.job.decode_threads)):
            yield chunk.result()

    def _kept_values(self, raw: Raw, folder: str, readable: bool) -> dict[str, Any]:
        """The columns that are copied. A picture that could not be read stays null: readers would stumble over it."""
        kept: dict[str, Any] = {}
        for name in self.job.kept:
            value = raw.values.get(name)
            if name not in self._pictures:
                kept[name] = kept_value(value, self.schema.field(name))
                continue
            kept[name] = None
            if readable and value is not None:
                with suppress(PictureError, FormError):
                    kept[name] = Encoded(picture_bytes(as_picture(value), self.job.source, folder))
        return kept

    # --- rows through the stage ---------------------------------------------------------------------------------------

    def _through_stage(self, task: Task) -> Iterator[tuple[int, Row]]:
        """(position, finished row) in any order, exactly one for each planned row."""
        refused: list[tuple[int, Row]] = []
        folders = _folders(task)

        def chunks() -> Iterator[list[tuple[Row, _Waiting]]]:
            for decoded in self._decoded(task):
                accepted = []
                for position, raw, row, problem in decoded:
                    kept = self._kept_values(raw, folders(position), row is not None) if self.job.kept else {}
                    if row is None:
                        refused.append((position, {**kept, "id": raw.id, "status": "failed", "error": problem}))
                    else:
                        accepted.append((row, _Waiting(position, row, kept)))
                yield accepted

        feed = _Feed(chunks())
        while not feed.exhausted:
            for out in self._guarded(feed):
                yield self._returned(out, feed)
                yield from _drain(refused)
            yield from _drain(refused)
        for own, waiting in feed.inside.items():
            lost = failed({**waiting.kept, "id": own}, "the stage returned nothing for this row")
            yield waiting.position, lost

    def _guarded(self, feed: _Feed) -> Iterator[Row]:
        """One call of the stage. If it raises, the rows inside are tried in halves until the culprits are alone."""
        try:
            yield from self.stage(feed)
        except Exception as error:
            if feed.error is not None:
                raise feed.error from None
            _raise_if_fatal(error)
            if not feed.inside:  # it raised before it took a row: give it one, so that the next call is another
                next(feed, None)
            rows = [waiting.row for waiting in feed.inside.values()]
            shrunk = _out_of_memory(error) and self._shrink()
            text = _describe(error)
        else:
            if feed.error is not None:
                raise feed.error
            if not feed.exhausted:
                raise ContractError("the stage stopped before it had taken all rows")
            return
        if rows:
            yield from self._isolate(rows, None if shrunk else text)

    def _isolate(self, rows: list[Row], reason: str | None) -> Iterator[Row]:
        """Rows that were inside when the stage raised, in halves until each has passed or is alone and to blame.

        Args:
            reason: Why it raised. None: out of memory, and the stage has shrunk; the rows may pass as they are.
        """
        half = len(rows) // 2
        for group in [rows] if reason is None or not half else [rows[:half], rows[half:]]:
            tried = self._attempt(group)
            yield from tried.rows
            if len(tried.left) == 1 and tried.reason is not None:
                yield failed(tried.left[0], tried.reason)
            elif tried.left:
                yield from self._isolate(tried.left, tried.reason)

    def _attempt(self, rows: list[Row]) -> _Tried:
        """Give some rows to the stage by themselves."""
        out: list[Row] = []
        try:
            for row in self.stage(iter(rows)):
                out.append(row)
        except Exception as error:
            _raise_if_fatal(error)
            given = {row.get("id") for row in out}
            left = [row for row in rows if row["id"] not in given]
            shrunk = _out_of_memory(error) and self._shrink()
            return _Tried(out, left, None if shrunk else _describe(error))
        return _Tried(out, [], None)

    def _shrink(self) -> bool:
        """Free what the failed call held, and ask the stage to get smaller."""
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        shrink = getattr(self.stage, "shrink", None)
        return bool(shrink()) if shrink is not None else False

    def _returned(self, out: Row, feed: _Feed) -> tuple[int, Row]:
        waiting = feed.inside.pop(out.get("id", ""), None)
        if waiting is None:
            raise ContractError(f"the stage returned id {out.get('id')!r}, which it was not given, or returned twice")
        if out.get("status") not in ("ok", "failed"):
            raise ContractError(f"the stage returned id {out['id']!r} with status {out.get('status')!r}")
        row: Row = {"id": out["id"], "status": out["status"], "error": out.get("error")}
        if out["status"] == "ok":
            row["error"] = None
            for column in self.job.columns:
                value = out.get(column.name)
                row[column.name] = self._encoded(value) if column.kind == "image" else value
        elif not row["error"]:
            row["error"] = "failed without a reason"
        row.update(waiting.kept)
        return waiting.position, row

    def _encoded(self, value: Any) -> Any:
        """A picture on its way to PNG, in another thread."""
        if value is None or isinstance(value, (bytes, bytearray, Encoded)) or not hasattr(value, "save"):
            return value
        return self._encoders.submit(encode_picture, value)

    # --- rows out -----------------------------------------------------------------------------------------------------

    def _groups(self, task: Task) -> Iterator[list[Row]]:
        """Finished rows in the input's order, in groups of a fixed size."""
        size = GROUP_PICTURES if self._pictures else GROUP_ROWS
        early: dict[int, Row] = {}
        group: list[Row] = []
        position = task.start
        for found, row in self._through_stage(task):
            self.done += 1
            early[found] = row
            while position in early:
                group.append(early.pop(position))
                position += 1
                if len(group) == size:
                    yield group
                    group = []
        if position != task.stop or early:
            planned, done = task.stop - task.start, position - task.start
            raise ContractError(f"shard {task.shard}: {planned} rows planned, {done} done")
        if group:
            yield group

    def _table(self, group: list[Row]) -> pa.Table:
        for row in group:
            for name, value in row.items():
                if isinstance(value, Future):
                    row[name] = value.result()
        return table(group, self.schema, self._kept)

    def _tables(self, task: Task) -> Iterator[Future[pa.Table]]:
        """Arrow tables on their way, built in the writer's thread; the stage runs in the caller's."""
        for group in self._groups(task):
            yield self._writer.submit(self._table, group)

    def _condemned(self, task: Task) -> Iterator[pa.Table]:
        """The row that kills workers: read, but neither decoded nor given to the stage."""
        rows = []
        assert task.condemned is not None
        for raw in read_rows(self.job.source, task.spans, task.start, 1, self.job.wanted):
            kept = self._kept_values(raw, "", False)
            rows.append({**kept, "id": raw.id, "status": "failed", "error": task.condemned})
        yield table(rows, self.schema, self._kept)

    # --- commit -------------------------------------------------------------------------------------------------------

    def process(self, task: Task) -> Record | Piece:
        """Map a task's rows and commit them (or write them as a piece).

        Raises:
            OSError: Nothing was committed; another attempt may succeed.
            ContractError, SourceError: No attempt will.
        """
        self.done, begun, started = 0, time.monotonic(), time.time()
        self._take_summary()  # what an attempt that failed left behind
        token = uuid4().hex[:12]
        part = "" if task.whole else f".{task.start}-{task.stop}"
        if task.pieces:
            piece = self._write(task, f"{task.shard:06d}.{token}.parquet", self._joined(task.pieces))
            piece = replace(piece, summary=tuple(name for p in task.pieces for name in p.summary))
        else:
            name = f"{task.shard:06d}{part}.{token}.parquet"
            piece = self._write(task, name, self._condemned(task) if task.condemned else self._tables(task))
            summary = self._take_summary() if not task.condemned else None
            if summary:
                name = f"{task.shard:06d}{part}.{token}.npz"
                commit.write_summary(self._folder, name, summary)
                piece = replace(piece, summary=(name,))
        if not task.whole:
            return piece
        record = Record(
            shard=task.shard,
            attempt=token,
            file=piece.file,
            size=piece.size,
            checksum=piece.checksum,
            rows_ok=piece.ok,
            rows_failed=piece.failed,
            started=started,
            seconds=time.monotonic() - begun,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            measures=piece.measures,
            errors=piece.errors,
            summary=piece.summary,
        )
        return commit.write_record(self._folder, record)

    def _write(self, task: Task, name: str, tables: Iterator[pa.Table | Future[pa.Table]]) -> Piece:
        attempt = commit.Attempt(self._folder, name, self.schema)
        statuses: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        measured: dict[str, dict[str, float]] = {}

        def write(rows: pa.Table | Future[pa.Table]) -> None:
            rows = rows.result() if isinstance(rows, Future) else rows
            attempt.add(rows)
            statuses.update(rows["status"].to_pylist())
            errors.update(pc.drop_null(rows["error"]).to_pylist())
            merge_measures(measured, measures(rows, self.job.measured))

        writing: deque[Future[None]] = deque()
        try:
            for rows in tables:
                writing.append(self._writer.submit(write, rows))
                while len(writing) > UNWRITTEN:
                    writing.popleft().result()
            while writing:
                writing.popleft().result()
            size, checksum = attempt.close()
        except BaseException:
            wait(writing)
            attempt.abandon()
            raise
        commit.check_attempt(self._folder, name, size, task.stop - task.start)
        found = commit.fold_errors(errors)
        return Piece(task.start, task.stop, name, size, checksum, statuses["ok"], statuses["failed"], measured, found)

    def _joined(self, pieces: tuple[Piece, ...]) -> Iterator[pa.Table]:
        for piece in sorted(pieces, key=lambda piece: piece.start):
            yield parquet.read(self._folder, f"{commit.ATTEMPTS}/{piece.file}").cast(self.schema)

    def _take_summary(self) -> dict[str, Any] | None:
        take = getattr(self.stage, "take_summary", None)
        summary: dict[str, Any] | None = take() if take is not None else None
        return summary

    # --- a timed sample -----------------------------------------------------------------------------------------------

    def calibrate(self, task: Task) -> tuple[int, float, int, int]:
        """(rows, seconds, bytes, failed) for a task, after its first row as a warm-up; writes nothing."""
        for rows in self._tables(replace(task, stop=task.start + 1)):
            rows.result()
        begun = time.monotonic()
        tables = [rows.result() for rows in self._tables(task)]
        seconds = time.monotonic() - begun
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.schema, compression="zstd", use_dictionary=False) as writer:
            for done in tables:
                writer.write_table(done)
        bad = sum(done["status"].to_pylist().count("failed") for done in tables)
        return sum(done.num_rows for done in tables), seconds, sink.tell(), bad


@dataclass(frozen=True)
class _Tried:
    """What came out of the stage, what did not, and why (None: it may pass in a smaller batch)."""

    rows: list[Row]
    left: list[Row]
    reason: str | None


def _drain(refused: list[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    while refused:
        yield refused.pop(0)


def _folders(task: Task) -> Any:
    """Position in the shard -> folder of the file that the row comes from."""
    edges, folders, at = [], [], 0
    for span in task.spans:
        at += span.stop - span.start
        edges.append(at)
        folders.append(span.path.rpartition("/")[0])
    if len(set(folders)) == 1:
        return lambda position: folders[0]
    from bisect import bisect_right

    return lambda position: folders[bisect_right(edges, position)]


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:1000] if text else type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "CUDA out of memory" in str(error)


def _raise_if_fatal(error: Exception) -> None:
    """Errors that are not about a row: a broken contract, or a device that is lost to this process."""
    if isinstance(error, ContractError):
        raise error
    text = str(error)
    if not _out_of_memory(error) and ("CUDA error" in text or "device-side assert" in text):
        raise Poisoned(_describe(error)) from error
