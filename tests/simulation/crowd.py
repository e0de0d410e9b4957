"""Very many workers under the runtime's own dispatcher: how much of their time they work, in the world's time.

What the driver computes takes no time of the world's by itself, so it is charged: each of its turns takes ``turn_s``,
which stands for Ray's calls, and, where asked, the processor time that the dispatcher really took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

from pipeline.contract import StageSpec
from pipeline.input.read import wanted_columns
from pipeline.input.rows import Span
from pipeline.input.shards import Shard
from pipeline.input.source import Source
from pipeline.output.commit import Record
from pipeline.output.dataset import Tally
from pipeline.run import dispatch
from pipeline.run.dispatch import Dispatcher
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Outcome, Resources, Task, WorkerJob
from tests.simulation.pool import Fleet, SimPool, _Member
from tests.simulation.schedule import _Meters, simulated
from tests.simulation.store import Bucket
from tests.simulation.world import Host, Thread, World, current
from tests.support.forgetful import Forgetful


@dataclass
class Used:
    """What became of the workers' time.

    Attributes:
        busy_s: Of all workers, with a shard; had_s: from when each was ready until no shard was left to be had.
        seconds: Until the last shard was done; driver_s: processor time that the dispatcher took, beside ``turn_s``.
    """

    shards: int = 0
    busy_s: float = 0.0
    had_s: float = 0.0
    seconds: float = 0.0
    driver_s: float = 0.0
    turns: int = 0

    @property
    def share(self) -> float:
        """Of the workers' time, that was work; the end, when shards are fewer than workers, is not counted."""
        return self.busy_s / self.had_s


class _Timed(World):
    """Knows what processor time one thread takes between its waits: ``spent`` since somebody last looked."""

    timed: Thread | None = None
    spent = mark = 0.0

    def pause(self, until: float | None) -> None:
        if self.timed is not current():
            return super().pause(until)
        self.spent += time.thread_time() - self.mark
        try:
            super().pause(until)
        finally:
            self.mark = time.thread_time()


class _Crowd(SimPool):
    """Workers that take their time, and commit nothing."""

    def __init__(self, job: WorkerJob, world: _Timed, turn_s: float, charged: bool) -> None:
        super().__init__(job, Resources())
        self.used, self._turn_s, self._charged = Used(), turn_s, charged
        self._since, self._clock, self._out = list[float](), world, math.inf
        world.timed, world.mark = current(), time.thread_time()

    def _live(self, member: _Member) -> None:
        world, chance = self._world, self._world.random.random
        world.pause(world.now + self._fleet.start_s * chance())
        member.ready = True
        self._since.append(world.now)
        self._ring()

    def _takes_more(self, member: _Member) -> bool:
        return False

    def _works(self, member: _Member, task: Task) -> None:
        world, begun = self._world, self._world.now
        world.pause(begun + self._fleet.task_s * (0.5 + world.random.random()))
        member.tasks.remove(task)
        self.used.busy_s += max(0.0, min(world.now, self._out) - begun)
        self._ended.append((task, Outcome("done", _record(task))))
        self._ring()

    def handed_out(self) -> None:
        """There is no shard left."""
        self._out = self._world.now
        self.used.had_s = sum(self._out - since for since in self._since)

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        world, used = self._clock, self.used
        world.pause(world.now + self._turn_s)
        taken, world.spent = world.spent, 0.0
        used.driver_s, used.turns = used.driver_s + taken, used.turns + 1
        if self._charged:
            world.pause(world.now + taken)
        return super().wait(seconds)


def _record(task: Task) -> Record:
    return Record(task.shard, "", "", 0, "", task.stop - task.start, 0, 0.0, 0.0, "")


class _Nothing:
    """A lock that is never lost, and a log that keeps nothing."""

    lost = False

    def check(self) -> None: ...

    def add(self, record: Record) -> None: ...


def crowd(workers: int, shards: int, shard_s: float, turn_s: float = 0.1, charged: bool = False) -> Used:
    """So many shards, of half to one and a half times ``shard_s`` seconds each, through so many workers.

    Args:
        turn_s: Of the world's seconds, that each of the dispatcher's turns takes.
        charged: The processor time that it takes counts too; then no two runs are the same.
    """
    world = _Timed(0)
    fleet = Fleet(world, Host("", "", ""))
    fleet.workers, fleet.task_s, fleet.died, fleet.cut_off = workers, shard_s, 0.0, 0.0
    bucket = Bucket(world)
    bucket.fleet = fleet  # type: ignore[attr-defined]
    source, found = Source(("in.txt",), columns={"text": "text"}), list[Used]()
    job = WorkerJob(StageSpec(""), source, wanted_columns(source, ()), (), "", (), "", {"bucket": bucket})

    def plan(pool: _Crowd) -> Iterator[Task]:
        for number in range(shards):
            yield Task.of(Shard(number, (Span("in.txt", "in.txt", number, number + 1),), None))
        pool.handed_out()

    def drive() -> None:
        pool, nothing = _Crowd(job, world, turn_s, charged), _Nothing()
        reporter, meters = Reporter(None, lambda progress: None, workers), _Meters("", 0)
        memory = Forgetful()
        Dispatcher(pool, plan(pool), Tally(), nothing, reporter, meters, 0.0, shards, 1, nothing, memory).run()  # type: ignore[arg-type]
        pool.used.shards, pool.used.seconds = shards, world.now
        found.append(pool.used)
        pool.close()

    with simulated(), patch.object(dispatch, "TICK_S", 0.5):
        driver = world.process(fleet.host, "driver").start(drive)
        world.run(1e7)
        world.close()
    if driver.error is not None:
        raise driver.error
    return found[0]
