"""A worker: holds a stage, maps one shard after another through it, commits each. Knows no Ray.

Beside the thread that drives the stage, one thread reads rows, some decode pictures, some encode them, and one writes:
the device waits for none of them. Rows come back from the stage in any order and are written in the input's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Container, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import machine
from pipeline.contract import Fit, Fits, Lessons, Row, Tally
from pipeline.input.source import SourceError
from pipeline.output import commit, parquet
from pipeline.output.commit import Record
from pipeline.output.schema import decode_schema
from pipeline.run.guard import Guard, Waiting
from pipeline.run.reading import Found, Reader
from pipeline.run.stream import Stream
from pipeline.run.tasks import Again, Piece, Task, WorkerJob
from pipeline.run.versions import told, versions
from pipeline.run.writing import Done, Named, Writer, in_order
from pipeline.storage import Folder


def _passed_by(found: Found) -> Done:
    """A row that the stage never sees: it cannot be had, or is a duplicate of another."""
    row = {**found.kept, "id": found.raw.id}
    if found.twin is not None:
        return Done({**row, "status": "duplicate", "error": None, "duplicate_of": found.twin})
    return Done({**row, "status": "failed", "error": found.problem})


class Worker:
    """Builds the stage; `process` may then be called any number of times, by several threads at once."""

    def __init__(self, job: WorkerJob) -> None:
        begun = machine.here.clock()
        self.job = job
        self.schema = decode_schema(job.schema)
        self._folder = Folder.at(job.output, job.storage_options)
        if job.gpus:
            machine.here.gpu_share = job.gpus
        pa.array([None])  # imports pandas, if there is one: a third of a second that no shard has to pay
        self.stage = job.stage.build()
        self.build_seconds = machine.here.clock() - begun
        self._reader = Reader(job, self.schema)
        self._stream = Stream(self._reader, Guard(self.stage), joins=self.holds > 0)
        self._writer = Writer(job, self._folder, self.schema)
        self._pictures = frozenset(column.name for column in job.columns if column.kind == "image")
        self._through = Counter[int]()  # shard in hand -> its rows that are through the stage
        self._ended = 0.0
        self._taking = threading.Lock()

    @property
    def holds(self) -> int:
        """Rows that the stage holds at a time, of however many tasks; 0: it takes one task after the other."""
        return int(getattr(self.stage, "holds", 0))

    @property
    def done(self) -> int:
        """Rows of the tasks in hand that are through the stage."""
        return sum(list(self._through.values()))

    @property
    def read(self) -> int:
        """Rows of the input read so far, in all tasks."""
        return self._reader.read

    def learned(self) -> dict[str, Fit]:
        """What running out of memory has taught the stage."""
        rooms = getattr(self.stage, "rooms", None)
        return rooms.learned() if isinstance(rooms, Lessons) else {}

    def _heed(self, fits: Fits) -> None:
        """Have the stage know what other workers learned."""
        rooms = getattr(self.stage, "rooms", None)
        if fits and isinstance(rooms, Lessons):
            rooms.heed(fits)

    def _rows(self, task: Task, only: Container[int] | None = None) -> Iterator[tuple[int, Done]]:
        """(position, finished row) in any order, exactly one for each planned row (of those at the places `only`)."""
        for row, out in self._stream.rows(task, only):
            self._through[task.shard] += 1
            yield row.position, _passed_by(row) if isinstance(row, Found) else self._finished(row, out or {})

    def _finished(self, waiting: Waiting, out: Row) -> Done:
        row: Row = {"id": out["id"], "status": out["status"], "error": out.get("error")}
        if out["status"] == "ok":
            row["error"] = None
            for column in self.job.columns:
                value = out.get(column.name)
                row[column.name] = self._writer.encoded(value) if column.name in self._pictures else value
        elif not row["error"]:
            row["error"] = "failed without a reason"
        given = {name: value for name, value in out.items() if name not in self._pictures} if self._pictures else out
        return Done({**row, **waiting.kept}, given)

    def _tables(self, task: Task, tally: Tally | None = None) -> Iterator[Future[pa.Table]]:
        return self._writer.tables(in_order(self._rows(task), task, self._writer.group_rows), tally)

    def _condemned(self, task: Task) -> Iterator[tuple[int, Done]]:
        """The row that kills workers: read, but neither decoded nor given to the stage."""
        assert task.condemned is not None
        failure = {"status": "failed", "error": task.condemned}
        for position, raw in enumerate(self._reader.undecoded(task), task.start):
            yield position, Done({**self._reader.kept(raw, "", None), "id": raw.id, **failure})

    def _again(self, task: Task, tally: Tally | None) -> Iterator[pa.Table]:
        """The task's rows as they were committed, but for those that had failed, which are done anew.

        Raises:
            SourceError: The input has another row in one's place.
        """
        assert task.again is not None
        old = parquet.read(self._folder, task.again.file).cast(self.schema).slice(task.start, task.stop - task.start)
        ids = dict(zip(range(task.start, task.stop), old["id"].to_pylist(), strict=True))
        statuses = zip(ids, old["status"].to_pylist(), strict=True)
        failed = frozenset(position for position, status in statuses if status == "failed")
        fresh = dict(self._condemned(task) if task.condemned else self._rows(task, failed)) if failed else {}
        for position, (row, _) in fresh.items():
            if row["id"] != ids[position]:
                raise SourceError(f"the input has {row['id']!r} where {ids[position]!r} was; it changed since the run")
        for start in range(task.start, task.stop, self._writer.group_rows):
            group = range(start, min(start + self._writer.group_rows, task.stop))
            part, places = old.slice(start - task.start, len(group)), [place for place in group if place in fresh]
            if places:
                new = self._writer.table([fresh.pop(place) for place in places], tally)
                order = [len(group) + places.index(p) if p in places else p - start for p in group]
                part = pa.concat_tables([part, new]).take(order)
            yield part

    def _made(self, task: Task, tally: Tally | None) -> Iterator[pa.Table | Future[pa.Table]]:
        """The task's rows, in order."""
        if task.pieces:
            return self._joined(task.pieces)
        if task.again and task.again.file:
            return self._again(task, tally)
        if task.condemned:
            return iter([self._writer.table([done for _, done in self._condemned(task)])])
        return self._tables(task, tally)

    def process(self, task: Task) -> Record | Piece:
        """Map a task's rows and commit them (or write them as a piece).

        Raises:
            OSError: Nothing was committed; another attempt may succeed.
            ContractError, SourceError: No attempt will.
            Superseded: The folder belongs to another run or driver by now.
        """
        self._through[task.shard] = 0
        try:
            self._heed(task.fits)
            return self._processed(task)
        finally:
            del self._through[task.shard]

    def _processed(self, task: Task) -> Record | Piece:
        begun, started = machine.here.clock(), machine.here.wall()
        if len(self._through) == 1:
            self._take_summary()  # what an attempt that failed left behind
        token = machine.here.token()[:12]
        part = "" if task.whole else f".{task.start}-{task.stop}"
        tally = self._tally()
        final = self._final(task)
        named = None if final is None else Named(token, partial(self._check, task))
        path = final or f"{commit.ATTEMPTS}/{self._name(task, f'{part}.{token}.parquet')}"
        try:
            piece = self._writer.write(task, path, self._made(task, tally), named)
        except commit.Taken:
            if (record := commit.find_record(self._folder, task.shard, self.job.run)) is None:
                raise
            return record
        if task.pieces:
            piece = replace(
                piece,
                summary=tuple(name for p in task.pieces for name in p.summary),
                summary_bytes=tuple(size for p in task.pieces for size in p.summary_bytes),
            )
        elif summary := self._summary(tally) if not task.condemned else None:
            name = self._name(task, f"{part}.{token}.npz")
            size = commit.write_summary(self._folder, name, summary)
            piece = replace(piece, summary=(name,), summary_bytes=(size,))
        if not task.whole:
            return piece
        again = task.again or Again("", 0, 0, (), ())
        now = machine.here.clock()
        begun, early, self._ended = max(begun, self._ended), max(0.0, self._ended - begun), now
        record = Record(
            shard=task.shard,
            attempt=token,
            file=piece.file,
            size=piece.size,
            checksum=piece.checksum,
            rows_ok=piece.ok,
            rows_failed=piece.failed,
            rows_duplicate=piece.duplicates,
            started=started + early,  # shards in hand overlap; each is told to begin where the last one ended
            seconds=now - begun,
            worker="{host}:{pid}".format_map(machine.here.process()),
            measures=piece.measures,
            errors=piece.errors,
            summary=again.summary + piece.summary,
            summary_bytes=again.summary_bytes + piece.summary_bytes,
            run=self.job.run,
            epoch=self.job.epoch,
            generation=again.generation,
            replaced=again.size,
            made_with=told(versions()),
        )
        if named is None:
            self._check(task)
        return commit.write_record(self._folder, record)

    def _check(self, task: Task) -> None:
        commit.check_current(self._folder, self.job.run, self.job.epoch, task.shard)

    def _final(self, task: Task) -> str | None:
        """Its shard's final name, if the file is to be written under it."""
        if task.part is None or not task.whole or (task.tried and self._folder.exists(task.part)):
            return None
        return task.part

    def _name(self, task: Task, rest: str) -> str:
        return commit.attempt_name(self.job.run, self.job.epoch, task.shard, rest)

    def _joined(self, pieces: tuple[Piece, ...]) -> Iterator[pa.Table]:
        for piece in sorted(pieces, key=lambda piece: piece.start):
            yield parquet.read(self._folder, f"{commit.ATTEMPTS}/{piece.file}").cast(self.schema)

    def _tally(self) -> Tally | None:
        """For a task's rows, if the stage has them counted."""
        new = getattr(self.stage, "tally", None)
        tally: Tally | None = new() if new is not None else None
        return tally

    def _summary(self, tally: Tally | None) -> dict[str, Any]:
        """What is kept beside a task's record; may be nothing."""
        return {**self._take_summary(), **(tally.summary() if tally is not None else {})}

    def _take_summary(self) -> dict[str, Any]:
        take = getattr(self.stage, "take_summary", None)
        with self._taking:  # tasks in hand end in threads of their own
            summary: dict[str, Any] = take() if take is not None else {}
        return summary

    def calibrate(self, task: Task) -> tuple[int, float, int, int]:
        """(rows, seconds, bytes, failed) for a task, after its first row as a warm-up; writes nothing."""
        for rows in self._tables(replace(task, stop=task.start + 1)):
            rows.result()
        begun = machine.here.clock()
        tables = [rows.result() for rows in self._tables(task)]
        seconds = machine.here.clock() - begun
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.schema, compression="zstd", use_dictionary=False) as writer:
            for done in tables:
                writer.write_table(done)
        bad = sum(done["status"].to_pylist().count("failed") for done in tables)
        return sum(done.num_rows for done in tables), seconds, sink.tell(), bad
