"""Machines, processes and time, all simulated: each thread is a greenlet, one moves at a time, and time jumps.

A thread moves from one wait to the next: for a time, for an event, or for a store's answer. Which moves next depends
on the world's clock and its random numbers alone, so that a seed is a whole history. A process may crash at any wait
(`Crash` is raised there, and at whatever its ``finally`` clauses wait for), and may stand still for a while.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import greenlet

from pipeline.machine import Machine

UNIX_S = 1.8e9
"""What an exact clock shows when the world begins."""


class Crash(BaseException):
    """The process is no more."""


class Endless(AssertionError):
    """Things still happen after all the time that a schedule may take."""


@dataclass(frozen=True)
class Host:
    """A machine, or a container on one.

    Attributes:
        name, boot, namespace: What it tells of itself; containers of one machine may differ in the last alone.
        ahead: Seconds that its clock is ahead of the true time.
        rate: Seconds that its clock goes on in a second.
    """

    name: str
    boot: str
    namespace: str
    ahead: float = 0.0
    rate: float = 1.0


class Process:
    """Something that runs, dies, or stands still."""

    def __init__(self, world: World, host: Host, name: str, pid: int) -> None:
        self.world, self.host, self.name, self.pid = world, host, name, pid
        self.began = str(world.count())
        self.alive, self.stalled, self.woke = True, 0.0, 0.0
        self.interrupted = False
        self.threads: list[Thread] = []
        self.on_death: list[Callable[[], None]] = []
        self.on_stall: list[Callable[[], None]] = []

    def start(self, function: Callable[..., Any], *args: Any) -> Thread:
        thread = Thread(self, function, args)
        self.threads.append(thread)
        self.world.wake(thread)
        return thread

    def die(self) -> None:
        """From now on it changes nothing. A thread of its own that calls this has to raise `Crash` itself."""
        if self.alive:
            self.alive = False
            for thread in self.threads:
                self.world.wake(thread)
            for told in self.on_death:
                told()

    def stall(self, seconds: float) -> None:
        """Stand still: paused by its system, or swapped out."""
        self.stalled = self.woke = max(self.stalled, self.world.now + seconds)
        for told in self.on_stall:
            told()

    def interrupt(self) -> None:
        """Ctrl-C in its first thread."""
        if self.alive:
            self.interrupted = True


class Thread(greenlet.greenlet):
    """A thread of a process."""

    def __init__(self, process: Process, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(self._work, process.world.main)
        self.process, self._call = process, (function, args)
        self.turn, self.over = 0, False
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = Event(process.world)

    def _work(self) -> None:
        function, args = self._call
        try:
            if not self.process.alive:
                raise Crash
            self.result = function(*args)
        except BaseException as error:
            self.error = error
        self.over = True
        if isinstance(self.error, Exception) and self.process.name == "worker":
            self.process.world.broken = self.error
        self.process.threads.remove(self)
        self.ended.set()


class Event:
    """Happens once; threads wait for it."""

    def __init__(self, world: World) -> None:
        self._world, self.happened, self._waiting = world, False, list[Thread]()

    def set(self) -> None:
        self.happened = True
        for thread in self._waiting:
            self._world.wake(thread)
        self._waiting.clear()

    def wait(self, seconds: float | None = None) -> None:
        """Until it happens, or for so long."""
        if self.happened:
            return
        world, thread = self._world, current()
        until = None if seconds is None else world.now + seconds
        self._waiting.append(thread)
        while not self.happened and (until is None or world.now < until):
            world.pause(until)
        if thread in self._waiting:
            self._waiting.remove(thread)


current: Callable[[], Thread] = greenlet.getcurrent  # type: ignore[assignment]


class World:
    """Time, and whose turn it is.

    Attributes:
        now: Seconds since the beginning.
        random: All chance comes from here.
        broken: What a worker's thread raised, which is to raise nothing.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.now, self.main = Random(seed), 0.0, greenlet.getcurrent()
        self._turns: list[tuple[float, int, Thread, int]] = []
        self._counted, self._end = 0, 0.0
        self.broken: Exception | None = None
        self.processes: list[Process] = []

    def count(self) -> int:
        self._counted += 1
        return self._counted

    def process(self, host: Host, name: str, pid: int | None = None) -> Process:
        """A new process, with a number that no other one of its namespace has, or that which is given."""
        made = Process(self, host, name, self.count() if pid is None else pid)
        self.processes.append(made)
        return made

    def wake(self, thread: Thread) -> None:
        """It moves now, whatever it waited for."""
        self._at(self.now, thread)

    def _at(self, when: float, thread: Thread) -> None:
        heapq.heappush(self._turns, (when, self.count(), thread, thread.turn))

    def pause(self, until: float | None) -> None:
        """The thread that calls waits until a time, or until it is woken."""
        thread = current()
        process = thread.process
        if process.alive:
            thread.turn += 1
            if until is not None and self._is_next(until) and process.stalled <= until:
                self.count()
                self.now = max(self.now, until)
            else:
                if until is not None:
                    self._at(until, thread)
                self.main.switch()
        if not process.alive:
            raise Crash
        if process.interrupted and process.threads[0] is thread:
            process.interrupted = False
            raise KeyboardInterrupt

    def _is_next(self, when: float) -> bool:
        """Whether nobody moves up to a time and at it: who waits for it may go on without a change of greenlets."""
        turns = self._turns
        while turns and (turns[0][2].over or turns[0][3] != turns[0][2].turn):
            heapq.heappop(turns)
        return when <= self._end and (not turns or turns[0][0] > when)

    def call(self, when: float, action: Callable[[], None]) -> None:
        """Do something at a time; it must not wait."""
        Process(self, Host("", "", ""), "fate", 0).start(self._later, when, action)

    def _later(self, when: float, action: Callable[[], None]) -> None:
        self.pause(when)
        action()

    def run(self, end: float) -> None:
        """Until nothing happens any more.

        Raises:
            Endless: Things still happen at a time.
        """
        self._end = end
        while self._turns:
            when, _, thread, turn = heapq.heappop(self._turns)
            if thread.over or turn != thread.turn:
                continue
            process = thread.process
            if process.alive and process.stalled > when:
                heapq.heappush(self._turns, (process.stalled, self.count(), thread, turn))
                continue
            if when > end:
                raise Endless(f"at {when:.0f} s {process.name} is still at work")
            self.now = max(self.now, when)
            thread.switch()
            if self.broken is not None:
                raise self.broken

    def close(self) -> None:
        """End all that is left, so that nothing of it moves when it is collected."""
        for process in self.processes:
            process.alive = False
            for thread in list(process.threads):
                if thread:
                    thread.throw(Crash)


class _Result:
    """What a thread of a simulated pool will answer."""

    def __init__(self, world: World, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._call, self._done, self._answer, self._error = (function, args), Event(world), None, None
        self.cancelled = False

    def work(self) -> None:
        function, args = self._call
        try:
            self._answer = function(*args)
        except Exception as error:
            self._error = error
        self._done.set()

    def result(self) -> Any:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._answer

    def cancel(self) -> None:
        self.cancelled = True


class _Threads:
    """A pool of threads of the current process, as `concurrent.futures` has it."""

    def __init__(self, process: Process, count: int) -> None:
        self._process, self._free, self._waiting = process, count, deque[_Result]()
        self._running: list[Thread] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> _Result:
        result = _Result(self._process.world, function, args)
        self._waiting.append(result)
        if self._free:
            self._free -= 1
            self._running.append(self._process.start(self._work))
        return result

    def _work(self) -> None:
        while self._waiting:
            result = self._waiting.popleft()
            if not result.cancelled:
                result.work()
        self._free += 1

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *exit: object) -> None:
        for thread in self._running if self._process.alive else ():
            thread.ended.wait()


class _Guard:
    """A context that one thread at a time is in."""

    def __init__(self, world: World) -> None:
        self._world, self._left = world, Event(world)
        self._left.set()

    def __enter__(self) -> None:
        while not self._left.happened:
            self._left.wait()
        self._left = Event(self._world)

    def __exit__(self, *exit: object) -> None:
        self._left.set()


class Simulated(Machine):
    """The machine under the process whose thread asks."""

    @property
    def _process(self) -> Process:
        return current().process

    def wall(self) -> float:
        process = self._process
        return UNIX_S + process.host.ahead + process.world.now * process.host.rate

    def clock(self) -> float:
        process = self._process
        return process.world.now * process.host.rate

    def sleep(self, seconds: float) -> None:
        process = self._process
        process.world.pause(process.world.now + seconds / process.host.rate)

    def token(self) -> str:
        return f"{self._process.world.random.getrandbits(128):032x}"

    def threads(self, count: int) -> Any:
        return _Threads(self._process, count)

    def guard(self) -> Any:
        return _Guard(self._process.world)

    def every(self, seconds: float, action: Callable[[], bool]) -> Callable[[], None]:
        process, ended = self._process, []

        def work() -> None:
            while not ended:
                self.sleep(seconds)
                if ended or not action():
                    return

        process.start(work)
        return lambda: ended.append(True)

    def process(self) -> Mapping[str, Any]:
        me = self._process
        return {"host": me.host.name, "boot": me.host.boot, "namespace": me.host.namespace, "pid": me.pid,
                "process": me.began}  # fmt: skip

    def began(self, pid: int) -> str:
        me = self._process
        home = (me.host.name, me.host.boot, me.host.namespace)
        for other in me.world.processes:
            if other.alive and other.pid == pid and (other.host.name, other.host.boot, other.host.namespace) == home:
                return other.began
        return ""
