"""Planning as tasks, in a part of the schedules: an input of several files, scanned by processes that die, which a user
may change as long as it goes on.

The real `spread` hands the tasks out and the real `survey` cuts what they find; Ray under the one and the files under
the other are made up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from typing import Any

from pipeline.input.files import InputFile
from pipeline.input.rows import FileScan
from pipeline.input.source import Source
from pipeline.run.columns import Watched
from pipeline.run.scan import Scanned, ScanTask
from tests.simulation.world import Crash, Event, Process, World, current

SINGLE = "in.txt"
DIED = 0.1
"""Of the processes that have a task, before it is done or before its answer is there."""


class Inputs:
    """What the rows are made of: a file, or for planning as tasks a few, of which there may be two versions.

    Attributes:
        tasks: It is planned as tasks.
        version: 0, or 1: a user has added a line to one of the files.
    """

    def __init__(self, random: Random, rows: int, tasks: bool) -> None:
        self.tasks, self.version = tasks, 0
        cuts = sorted(random.randint(0, rows) for _ in range(random.choice((1, 2, 4)))) if tasks else []
        edges = [0, *cuts, rows]
        self._sizes = [stop - start for start, stop in pairwise(edges)]
        self._longer = random.randrange(len(self._sizes))
        self.scan_s = random.choice((0.1, 5.0, 60.0))

    def files(self, version: int) -> list[tuple[str, int]]:
        """Name and lines of each file."""
        if not self.tasks:
            return [(SINGLE, sum(self._sizes))]
        return [(f"{number}.txt", size + (version and number == self._longer))
                for number, size in enumerate(self._sizes)]  # fmt: skip

    def lines(self, planned: int) -> list[tuple[str, int]]:
        """File and number of every line of the version that has so many."""
        version = int(planned != sum(self._sizes))
        return [(name, line) for name, size in self.files(version) for line in range(size)]

    def put_back(self, planned: int) -> None:
        """As it was when a plan of so many lines was made."""
        self.version = int(planned != sum(self._sizes))


def listed(source: Source, *rest: Any) -> Iterator[InputFile]:
    """As `pipeline.input.files.list_files`: what there is when somebody looks."""
    inputs: Inputs = current().process.world.inputs  # type: ignore[attr-defined]
    version = inputs.version
    for name, size in inputs.files(version):
        yield InputFile(name, f"{source.path[0]}/{name}", size, f"of {size} lines")


def scanned(task: ScanTask) -> Scanned:
    """As `pipeline.run.scan.scan_elsewhere`: it takes its time."""
    process, file = current().process, task.file
    process.world.pause(process.world.now + process.world.inputs.scan_s * 2 * process.world.random.random())  # type: ignore[attr-defined]
    assert task.keep is not None
    watched = Watched(task.source, task.keep, task.reads)
    look = watched.look(task.most)
    if look is not None:
        look(0, {"text": "line 0"})
    return Scanned(file, FileScan(file.size, file.version), None, watched.kept)


def scanned_again(source: Source, file: InputFile, content: str, rows: int) -> tuple[FileScan, bool]:
    """As `pipeline.input.read.scanned_again`."""
    return FileScan(file.size, file.version), file.version == content


class RayError(Exception):
    """A task could not be done however often it was tried."""


@dataclass
class _Answer:
    """Of a task that was given out."""

    ended: Event
    value: Any = None
    lost: bool = False


class Ray:
    """What `pipeline.run.cluster.spread` asks of Ray."""

    exceptions = SimpleNamespace(RayError=RayError)

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 2.0}

    @staticmethod
    def remote(num_cpus: int, max_retries: int) -> Callable[[Callable[..., Any]], Any]:
        return lambda function: SimpleNamespace(remote=lambda *args: _given(function, args, max_retries))

    @staticmethod
    def get(answer: _Answer) -> Any:
        answer.ended.wait()
        if answer.lost:
            raise RayError("the worker died")
        return answer.value


def _given(function: Callable[..., Any], args: tuple[Any, ...], retries: int) -> _Answer:
    """A task is on its way to a process, and if that dies to another."""
    driver = current().process
    world, answer, tried = driver.world, _Answer(Event(driver.world)), Counter[str]()

    def begin() -> None:
        process = world.process(world.fleet.host, "worker")  # type: ignore[attr-defined]
        process.on_death.append(again)
        driver.on_death.append(process.die)
        process.start(work, process)

    def again() -> None:
        tried["died"] += 1
        if not driver.alive or tried["died"] > retries:
            answer.lost = True
            answer.ended.set()
        else:
            begin()

    def work(process: Process) -> None:
        doomed, late = world.random.random() < DIED, world.random.random() < 0.5
        value = function(*args) if late or not doomed else None
        if doomed:
            process.die()
            raise Crash
        answer.value, process.alive = value, False
        answer.ended.set()

    begin()
    return answer


def settle(world: World, inputs: Inputs, fleet: Any) -> None:
    """What the world's processes find there."""
    world.inputs, world.fleet = inputs, fleet  # type: ignore[attr-defined]
