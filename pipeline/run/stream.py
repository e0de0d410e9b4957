"""Rows of the tasks that a worker has in hand, through its stage in one call: as a shard runs out, the next one's rows
enter, and the stage's slots stay full. Each task gets its own rows back, and nothing of the others.

A thread reads, one drives the stage, and each task's takes what is done of it. The stage's call ends when there is
nothing more to read for now; another begins with the next task.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.contract import Row
from pipeline.run.guard import Guard, Waiting
from pipeline.run.reading import Found, Item, Reader, Reading
from pipeline.run.tasks import Task

UNTAKEN = 4096
"""Finished rows of a task that may wait for its thread, which builds tables of them, before the stage is held back."""
LOOK_S = 0.005
"""How often who is held back looks whether there is room again, and whether anybody still wants the rows."""
GATHER_S = 0.002
"""How long who has taken all finished rows lets new ones gather, so that two threads do not wake each other for every
row."""
Done = tuple[Found | Waiting, Row | None]
"""A row that is done: with what the stage made of it, or as it was found if the stage was not to see it."""
_END = object()


@dataclass(eq=False)
class Passage(Reading):
    """A task on its way.

    Attributes:
        inside: Its rows that the stage has.
        read: All its rows have been read.
    """

    inside: int = 0
    read: bool = False
    done: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def put(self, item: Any) -> None:
        """Hand over a row, an error, or the end."""
        while not self.closed:
            if self.done.qsize() < UNTAKEN:
                return self.done.put(item)
            time.sleep(LOOK_S)

    def fail(self, error: BaseException) -> None:
        """It ends with an error; rows of it that the stage has are dropped as they come out."""
        self.put(error)
        self.closed = True

    def settle(self) -> None:
        """End it, if all is done."""
        if self.read and not self.inside:
            self.put(_END)


class Stream:
    """Puts tasks through a stage. `rows` may be called by several threads at once.

    Args:
        joins: The stage takes rows of several tasks in one call (`pipeline.contract.StageSpec`).
    """

    def __init__(self, reader: Reader, guard: Guard, *, joins: bool) -> None:
        self._reader, self._guard, self._joins = reader, guard, joins
        self._thread = ThreadPoolExecutor(1, "latentmill-stage")
        self._changed = threading.Condition()
        self._running = self._ending = False
        self._coming = deque[Passage]()
        self._open: set[Passage] = set()  # somebody waits for more of them
        self._unread: list[Passage] = []  # not yet read to their ends
        self._inside: dict[str, Passage] = {}
        self._kept_back: tuple[Passage, list[Waiting]] | None = None

    def rows(self, task: Task, only: Container[int] | None = None) -> Iterator[Done]:
        """A task's rows in any order, exactly one for each that is planned (of those at the places `only`).

        Raises:
            ContractError, Poisoned: As `Guard.through`; then every task in hand ends so.
            SourceError, OSError: The task's rows cannot be read.
        """
        passage = Passage(task, only)
        with self._changed:
            self._coming.append(passage)
            self._open.add(passage)
            self._unread.append(passage)
            self._changed.notify_all()
            if not self._running:
                self._running = True
                self._thread.submit(self._run)
        try:
            while (item := passage.done.get()) is not _END:
                if isinstance(item, BaseException):
                    raise item
                yield item
                if passage.done.empty():
                    time.sleep(GATHER_S)
        finally:
            with self._changed:
                passage.closed = True
                self._open.discard(passage)

    # --- the reading thread

    def _passages(self) -> Iterator[Passage | None]:
        """One task after another. None: there is none for now, and the next is waited for."""
        while True:
            with self._changed:
                idle = not self._coming
            if idle:
                yield None
            with self._changed:
                self._changed.wait_for(lambda: self._coming or self._ending)
                if self._ending:
                    return
                passage = self._coming.popleft()
            yield passage

    # --- the stage's thread

    def _run(self) -> None:
        """Call the stage for as long as there are tasks."""
        self._ending = False
        source = self._reader.rows(self._passages())
        try:
            while self._goes_on():
                for waiting, out in self._guard.through(self._chunks(source)):
                    passage = self._inside.pop(waiting.id)
                    passage.inside -= 1
                    passage.put((waiting, out))
                    passage.settle()
        except BaseException as error:
            self._fail(error)
        source.close()
        with self._changed:  # what came in while the reader was ending
            if self._unread:
                self._thread.submit(self._run)
            else:
                self._running = False

    def _goes_on(self) -> bool:
        """Whether there is more to do. If not, the reader takes no further task: the next call's does."""
        with self._changed:
            self._ending = not self._unread and self._kept_back is None
            self._changed.notify_all()
            return not self._ending

    def _fail(self, error: BaseException) -> None:
        """Everything in hand ends with an error."""
        with self._changed:
            passages = list(self._open)
            self._unread.clear()
            self._coming.clear()
            self._inside.clear()
            self._kept_back, self._ending = None, True
            self._changed.notify_all()
        for passage in passages:
            passage.fail(error)

    def _chunks(self, source: Iterator[Item[Passage] | None]) -> Iterator[list[Waiting]]:
        """What the stage gets in one call."""
        if self._kept_back is not None:
            kept, self._kept_back = self._kept_back, None
            yield self._entered(*kept)
        for item in source:
            if item is None:  # the reader has no task
                if not self._unread:
                    return
                continue
            passage, found = item
            if found is None:
                self._read(passage)
                if not self._joins:
                    return
            elif isinstance(found, Exception):
                passage.fail(found)
            elif not passage.closed:
                accepted = self._accepted(passage, found)
                if any(self._inside.get(waiting.id, passage) is not passage for waiting in accepted):
                    self._kept_back = passage, accepted  # until another task's row of that id is out
                    return
                yield self._entered(passage, accepted)

    def _read(self, passage: Passage) -> None:
        with self._changed:
            self._unread.remove(passage)
        passage.read = True
        passage.settle()

    def _accepted(self, passage: Passage, chunk: list[Found]) -> list[Waiting]:
        """The rows of a chunk that go to the stage; the others are done."""
        accepted = []
        for found in chunk:
            if found.row is None:
                passage.put((found, None))
                continue
            again = partial(self._reader.again, found)
            accepted.append(Waiting(found.position, found.raw.id, found.row, found.kept, again))
            found.row = None  # who gets it is its only holder
        return accepted

    def _entered(self, passage: Passage, accepted: list[Waiting]) -> list[Waiting]:
        passage.inside += len(accepted)
        for waiting in accepted:
            self._inside[waiting.id] = passage
        return accepted
