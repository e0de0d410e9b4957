"""The driver's loop: hands shards to workers, retries, splits a shard that kills its workers, counts, and reports.

A shard that kills its workers is cut in halves until the row that does it is alone and becomes an error row
(`pipeline.run.deaths` decides); the pieces are then put together into the shard.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline import machine
from pipeline.failures import Fault
from pipeline.output.commit import Record
from pipeline.output.dataset import Tally
from pipeline.output.fold import Folding
from pipeline.output.lock import Lock
from pipeline.run.deaths import Deaths
from pipeline.run.memory import Memory
from pipeline.run.meters import Meters
from pipeline.run.pool import Pool
from pipeline.run.reporter import TICK_S, Reporter
from pipeline.run.tasks import Outcome, Piece, Task

STORAGE_TRIES = 4
AWAY_TRIES = 10
"""For what is away: some five minutes of pauses, and what the tries take."""
BUILD_TRIES = 4
PATIENCE_S = 900.0
"""How long a run waits for its first worker before it gives up: time for a cluster to start a node."""
RETRY_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class Stopped(RuntimeError):
    """The run cannot go on; the message says why."""


@dataclass
class _Split:
    """A shard that is being done in pieces."""

    whole: Task
    missing: int = 0
    pieces: list[Piece] = field(default_factory=list)


class Dispatcher:
    """Runs all uncommitted shards through a pool.

    Raises (from `run`):
        Stopped: No worker can be had, a worker broke the stage's contract, storage keeps failing, too many failed rows.
        LockLost: Another run took the folder.
    """

    def __init__(
        self, pool: Pool, tasks: Iterator[Task], tally: Tally, lock: Lock, reporter: Reporter, meters: Meters,
        max_failed: float, left: int, min_workers: int, folding: Folding, memory: Memory,
    ) -> None:  # fmt: skip
        self._pool, self._tasks, self._tally, self._lock = pool, tasks, tally, lock
        self._reporter, self._meters, self._max_failed, self._left = reporter, meters, max_failed, left
        self._min_workers, self._folding, self._memory = min_workers, folding, memory
        self._waiting: deque[Task] = deque()
        self._later: list[tuple[float, Task]] = []
        self._deaths = Deaths()
        self._tries: Counter[tuple[int, int, int]] = Counter()
        self._splits: dict[int, _Split] = {}
        self._given = 0
        """Tasks that workers have."""

    def run(self) -> None:
        """Until every shard is committed."""
        begun = told = machine.here.clock()
        while self._left:
            self._pool.grow(min(self._pool.room(), self._left + sum(s.missing for s in self._splits.values())))
            self._hand_out()
            for task, outcome in self._pool.wait(TICK_S):
                self._settle(task, outcome)
            self._pool.ask()
            now = machine.here.clock()
            for message in self._pool.lost:
                self._say(message)
            self._pool.lost.clear()
            self._check(now - begun)
            if self._pool.ready < self._min_workers and now - told > 30:
                told = now
                self._say(f"waiting for workers: {self._pool.ready} of at least {self._min_workers} are ready; "
                          f"the cluster has {self._pool.available()}")  # fmt: skip
            self._meters.turn(self._pool.ready, self._pool.deaths, self._tally.rows)
            self._reporter.running(self._tally, self._pool.active_rows, self._pool.ready, self._pool.size)

    def _say(self, message: str) -> None:
        self._reporter.running(self._tally, self._pool.active_rows, self._pool.ready, self._pool.size, message)

    def _check(self, seconds: float) -> None:
        if self._lock.lost:
            self._lock.check()
        if self._pool.build_failures >= BUILD_TRIES:
            raise Stopped(f"the stage cannot be built: {self._pool.build_problem}")
        if not self._pool.ready and not self._tally.shards and seconds > PATIENCE_S and not self._pool.build_failures:
            raise Stopped(
                f"no worker could be had in {PATIENCE_S:.0f} s; the cluster has {self._pool.available()}: ask for less "
                "in `resources`, or add nodes"
            )
        if self._tally.failed > self._max_failed:
            raise Stopped(
                f"{self._tally.failed} rows failed, max_failed_fraction allows {self._max_failed:.0f}: `latentmill "
                "failed` on the output folder lists them with their reasons; once these are mended, the same command "
                "with --retry-failed does those rows again (or raise max_failed_fraction)"
            )

    def _hand_out(self) -> None:
        now = machine.here.clock()
        due = [task for when, task in self._later if when <= now]
        self._later = [(when, task) for when, task in self._later if when > now]
        self._waiting.extend(due)
        for _ in range(self._pool.idle):
            task = self._next()
            if task is None:
                return
            self._give(task)
        # More than one to a worker, for a stage that joins them, while there is one left for every worker.
        while self._pool.hungry and self._left - self._given >= self._pool.size:
            if any(self._deaths.alone(task) for task in self._waiting):
                return  # it needs a worker that has nothing else
            task = self._next()
            if task is None:
                return
            self._give(task)

    def _give(self, task: Task) -> None:
        self._given += 1
        self._pool.give(replace(self._deaths.given(task), fits=self._memory.fits))

    def _next(self) -> Task | None:
        """What a worker may have now: first what waits, then a new shard."""
        for _ in range(len(self._waiting)):
            task = self._waiting.popleft()
            if self._deaths.may_go(task):
                return task
            self._waiting.append(task)
        return next(self._tasks, None)

    def _settle(self, task: Task, outcome: Outcome) -> None:
        self._given -= 1
        self._meters.ended(outcome)
        task = replace(task, tried=True)
        for message in self._memory.add(outcome.fits):
            self._say(message)
        key = (task.shard, task.start, task.stop)
        if outcome.kind == "done":
            self._deaths.done(task)
            if isinstance(outcome.result, Record):
                self._committed(outcome.result)
            elif outcome.result is not None:
                self._piece(task, outcome.result)
        elif outcome.kind is Fault.TRANSIENT:
            self._tries[key] += 1
            if self._tries[key] >= (AWAY_TRIES if outcome.away else STORAGE_TRIES):
                raise Stopped(f"shard {task.shard} could not be done: {outcome.reason}; once that is mended, the same "
                              "command goes on")  # fmt: skip
            pause = min(RETRY_WAIT_S * 2 ** self._tries[key], LONGEST_WAIT_S)
            self._say(f"shard {task.shard} has to wait ({outcome.reason}); it is tried again in {pause:.0f} s")
            self._meters.retried()
            self._later.append((machine.here.clock() + pause, task))
        elif outcome.kind in (Fault.POISON, Fault.PREEMPTED):
            self._died(task, outcome)
        else:
            raise Stopped(f"shard {task.shard}: {outcome.reason}")
        self._deaths.returned(task)

    def _committed(self, record: Record) -> None:
        self._splits.pop(record.shard, None)
        self._tally.add(record)
        self._left -= 1
        self._meters.committed(record.rows_ok, record.rows_failed, record.rows_duplicate)
        self._folding.add(record)

    def _died(self, task: Task, outcome: Outcome) -> None:
        """The worker that had it is no more."""
        rows, reason = task.rows(), outcome.reason
        lost = outcome.kind is Fault.PREEMPTED
        verdict = self._deaths.preempted(task) if lost else self._deaths.died(task, outcome)
        if verdict == "stop":
            raise Stopped(f"{rows}: every worker that takes them is lost, the last one because {reason}; nothing of "
                          "the other shards is lost, the same command goes on")  # fmt: skip
        if verdict == "again":
            self._say(f"a worker {'was lost' if lost else 'died'} on {rows} ({reason}); they will be tried again")
            self._meters.retried()
            self._waiting.append(task)
        elif verdict == "condemn":
            self._say(f"{rows}: this row kills its worker; it becomes an error row")
            why = f"this row killed {self._deaths.count(task)} workers ({reason}); it was not tried again"
            self._waiting.append(replace(task, condemned=why))
        else:
            self._say(f"{rows} killed their worker again; they are tried in halves")
            split = self._splits.setdefault(task.shard, _Split(task))
            middle = (task.start + task.stop) // 2
            halves = [(task.start, middle), (middle, task.stop)]
            split.missing += 2 if task.whole else 1
            self._meters.retried(len(halves))
            self._waiting.extend(replace(task, start=a, stop=b, whole=False, avoid=()) for a, b in halves)

    def _piece(self, task: Task, piece: Piece) -> None:
        split = self._splits[task.shard]
        split.pieces.append(piece)
        split.missing -= 1
        if not split.missing:
            self._waiting.append(replace(split.whole, pieces=tuple(split.pieces)))
