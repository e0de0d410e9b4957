"""What stands in for Ray: workers on simulated machines, which die, are taken away, or are cut off and go on.

A worker commits with the real code (`Worker.process`, `Writer`, `pipeline.output.commit`); its rows are made up, and
the bytes of a shard made once for all schedules.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import Tally
from pipeline.failures import Fault
from pipeline.output import commit
from pipeline.output.schema import decode_schema, measures, merge_measures, table
from pipeline.run import pool
from pipeline.run.tasks import Outcome, Piece, Resources, Task, WorkerJob
from pipeline.run.worker import Worker
from pipeline.run.writing import Done, Named, Writer
from pipeline.storage import Folder, checksum
from tests.simulation.world import Crash, Event, Host, Process, World, current


def _row(name: str, line: int, factor: float, moody: bool) -> dict[str, Any]:
    """A row as it has to come out; of moody ones every third fails."""
    row: dict[str, Any] = {"id": f"{name}#{line}", "status": "ok", "error": None, "text": f"line {line}"}
    failed = moody and line % 3 == 0
    return {**row, **({"status": "failed", "error": "not now"} if failed else {"length": factor * line})}


FORMS = 3
LATE = 0.5
"""Of the workers that are cut off, so many are besides where they are about to end a file."""


@lru_cache(8192)
def made(
    columns: str, factor: float, lines: tuple[tuple[str, int, int], ...], moody: bool = False, form: int = 0
) -> tuple[bytes, pa.Table]:
    """Rows as they have to come out: as a file, and as a table.

    Args:
        columns: The encoded schema.
        lines: File, first line and line after the last, of each span.
        form: Of the `FORMS` of the file, of other lengths, that attempts write: no two are the same to the byte.
    """
    schema = decode_schema(columns)
    rows = [_row(name, line, factor, moody) for name, start, stop in lines for line in range(start, stop)]
    full = table(rows, schema, frozenset({"text"}))
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(full)
        writer.add_key_value_metadata({commit.ATTEMPT_KEY: "x" * form})
    return sink.getvalue(), full


NODES = ("node a", "node b")
"""Where workers are."""


class _Inline:
    """A thread that is not one."""

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _Writer(Writer):
    """Writes what `made` made; the real one puts pieces together, and new rows into a shard that has them."""

    group_rows = 4096

    def __init__(
        self, job: WorkerJob, folder: Folder, schema: pa.Schema, fleet: Fleet, stands: Callable[[Task], None]
    ) -> None:
        self._stands = stands
        self._folder, self._schema, self._kept, self._measured = folder, schema, frozenset(job.kept), job.measured
        self._thread, self._job, self._fleet = _Inline(), job, fleet  # type: ignore[assignment]

    def write(self, task: Task, path: str, tables: Iterator[Any], named: Named | None = None) -> Piece:
        if task.pieces or (task.again and task.again.file):
            return super().write(task, path, tables, named)
        lines = _lines(task)
        form = self._fleet.forms.randrange(FORMS)
        content, full = made(self._job.schema, self._job.stage.params["factor"], lines, self._fleet.fails(), form)
        upload = self._folder.begin(path, named is not None)
        upload.write(content)
        if named is not None:
            named.check()
            self._stands(task)
        commit.end(upload, self._folder, path)
        commit.check_attempt(self._folder, path, len(content), task.stop - task.start)
        digest, measured, failed = _told(content, self._measured)
        ok, errors = full.num_rows - failed, {"not now": failed} if failed else {}
        return Piece(task.start, task.stop, path.rpartition("/")[2], len(content), digest, ok, failed, measured, errors)


@lru_cache(8192)
def _told(content: bytes, measured: tuple[str, ...]) -> tuple[str, dict[str, dict[str, float]], int]:
    """Checksum, measures and failed rows of a file."""
    full, merged = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False), dict[str, dict[str, float]]()
    merge_measures(merged, measures(full, measured))
    return checksum(io.BytesIO(content)), merged, full["status"].to_pylist().count("failed")


def _lines(task: Task) -> tuple[tuple[str, int, int], ...]:
    """The lines of a task, which may be a part of its shard."""
    every = [(span.name, line) for span in task.spans for line in range(span.start, span.stop)]
    return tuple((name, line, line + 1) for name, line in every[task.start : task.stop])


class _Worker(Worker):
    """The real commit; rows that are made up in no time, after some of the world's."""

    def __init__(self, job: WorkerJob, fleet: Fleet, stands: Callable[[Task], None]) -> None:
        self.job, self.schema = job, decode_schema(job.schema)
        self._folder = Folder.at(job.output, job.storage_options)
        self._writer, self._fleet = _Writer(job, self._folder, self.schema, fleet, stands), fleet
        self._through, self._ended, self.stage = Counter(), 0.0, lambda rows: iter(())

    def _tables(self, task: Task, tally: Tally | None = None) -> Iterator[Any]:
        yield from ()

    def _rows(self, task: Task, only: Container[int] | None = None) -> Iterator[tuple[int, Done]]:
        factor, moody = self.job.stage.params["factor"], self._fleet.fails()
        for position, (name, line, _) in enumerate(_lines(task), task.start):
            if only is None or position in only:
                yield position, Done(_row(name, line, factor, moody))

    def _tally(self) -> Tally | None:
        return None

    def _take_summary(self) -> dict[str, Any]:
        return {"count": np.array([1])} if self._fleet.summaries else {}


class _Heart:
    """Nobody listens to it: the world knows which processes hang."""

    def begin(self) -> None: ...


class _Member:
    """A worker as its pool sees it."""

    def __init__(self, process: Process) -> None:
        self.process, self.ready, self.tasks = process, False, list[Task]()
        self.dropped, self.fault = False, Fault.PREEMPTED
        self.actor: Any = None
        self.node = process.world.random.choice(NODES)


class SimPool:
    """As `pipeline.run.pool.Pool`.

    The world's `fleet` says how many workers there may be, how long a task takes, and how often one is lost.
    """

    def __init__(self, job: WorkerJob, resources: Resources) -> None:
        self._job, self._driver, self._world = job, current().process, current().process.world
        self._fleet: Fleet = job.storage_options["bucket"].fleet
        self._members, self._ended = list[_Member](), list[tuple[Task, Outcome]]()
        self._bell = Event(self._world)
        self._deaths: Counter[tuple[int, int, int]] = Counter()
        self._driver.on_death.append(self.close)
        self.lost: list[str] = []
        self.deaths, self.build_failures, self.build_problem = 0, 0, ""

    def room(self) -> int:
        return self._fleet.workers

    def grow(self, size: int) -> None:
        while len(self._members) < size:
            process = self._world.process(self._fleet.host, "worker")
            member = _Member(process)
            process.on_death.append(lambda member=member: self._dies(member))
            self._members.append(member)
            process.start(self._live, member)

    def _live(self, member: _Member) -> None:
        world, chance = self._world, self._world.random.random
        actor = pool._Actor.__new__(pool._Actor)
        actor.heart = _Heart()  # type: ignore[assignment]
        world.pause(world.now + self._fleet.start_s * chance())
        actor.worker = _Worker(self._job, self._fleet, lambda task: self._stands(member, task))
        member.ready = True
        member.actor = actor
        self._ring()

    def _works(self, member: _Member, task: Task) -> None:
        """A thread of a worker, which may have several tasks in hand."""
        world, chance = self._world, self._world.random.random
        world.pause(world.now + self._fleet.task_s * (0.5 + chance()))
        if chance() < self._fleet.died and self._may_die(task):
            member.fault = Fault.POISON
            member.process.die()
            raise Crash
        if chance() < self._fleet.cut_off and self._may_die(task):
            self._loses(member)
            world.pause(world.now + chance() * self._fleet.cut_off_s)
        outcome = member.actor.process(task)
        if not member.dropped:
            member.tasks.remove(task)
            self._ended.append((task, outcome))
            self._ring()

    def _stands(self, member: _Member, task: Task) -> None:
        """It is cut off, and stands still, where a file is about to get its final name."""
        chance = self._fleet.forms.random
        if chance() < self._fleet.cut_off * LATE and self._may_die(task):
            self._loses(member)
            self._world.pause(self._world.now + chance() * self._fleet.cut_off_s)

    def _may_die(self, task: Task) -> bool:
        """Whether the dispatcher would not yet hold the rows for the cause."""
        key, alone = (task.shard, task.start, task.stop), task.stop - task.start == 1
        self._deaths[key] += 1
        return not task.pieces and self._deaths[key] <= (1 if alone else 2)

    def _dies(self, member: _Member) -> None:
        self._world.call(self._world.now + 5 * self._world.random.random(), lambda: self._loses(member))

    def _loses(self, member: _Member) -> None:
        """The driver hears that it is gone."""
        if not member.dropped:
            member.dropped = True
            self._members.remove(member)
            lost = Outcome(member.fault, reason="it is gone", node=member.node, nodes=frozenset(NODES))
            self._ended += [(task, lost) for task in member.tasks]
            self._ring()

    def _ring(self) -> None:
        bell, self._bell = self._bell, Event(self._world)
        bell.set()

    @property
    def size(self) -> int:
        return len(self._members)

    @property
    def ready(self) -> int:
        return sum(member.ready for member in self._members)

    @property
    def idle(self) -> int:
        return sum(member.ready and not member.tasks for member in self._members)

    @property
    def hungry(self) -> bool:
        return any(self._takes_more(member) for member in self._members)

    def _takes_more(self, member: _Member) -> bool:
        return 0 < len(member.tasks) < self._fleet.in_hand and not any(task.alone for task in member.tasks)

    @property
    def active_rows(self) -> int:
        return 0

    def available(self) -> str:
        return f"{self._fleet.workers} simulated workers"

    def give(self, task: Task) -> None:
        idle = (member for member in self._members if member.ready and not member.tasks)
        member = next(idle, None) or next(member for member in self._members if self._takes_more(member))
        member.tasks.append(task)
        member.process.start(self._works, member, task)

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        if not self._ended:
            self._bell.wait(seconds)
        ended, self._ended = self._ended, []
        return ended

    def ask(self) -> None:
        """Nothing is known of rows under way."""

    def close(self) -> None:
        """The driver is done with its workers; those that it cannot reach go on with what they have."""
        members, self._members = self._members, []
        for member in members:
            member.dropped = True
            if self._world.random.random() >= self._fleet.orphans:
                member.process.die()


class Fleet:
    """The workers that a schedule's drivers get.

    Attributes:
        in_hand: Most tasks that a worker has at once.
        moody: Rows fail until all is calm, and are to be done again.
        forms: Decides in which form a worker writes a file, and whether it stands still before that has its name.
    """

    def __init__(self, world: World, host: Host) -> None:
        chance = world.random
        self.host, self.workers = host, chance.choice((1, 2, 3, 8))
        self.start_s, self.task_s = 5.0, chance.choice((0.1, 2.0, 20.0))
        self.died, self.cut_off = chance.choice((0.0, 0.0, 0.1)), chance.choice((0.0, 0.0, 0.1))
        self.cut_off_s, self.orphans = chance.choice((5.0, 300.0)), chance.choice((0.0, 0.5))
        self.summaries, self.moody = chance.random() < 0.1, chance.random() < 0.15
        self.in_hand = chance.choice((1, 1, 3))
        self.forms = Random(chance.random())
        self.calm = False

    def fails(self) -> bool:
        """Whether some rows fail at present."""
        return self.moody and not self.calm
