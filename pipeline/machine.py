"""What a process gets from the machine that it runs on: clocks, sleep, chance, threads, and who it is.

Whatever of the runtime waits, asks for the time, draws a name or starts a thread does it through `here`, so that a
simulation puts a world with a clock of its own under the same code (tests/simulation).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

T = TypeVar("T")
S = TypeVar("S")


class Machine:
    """This one.

    Attributes:
        gpu_share: GPUs that this process was given; below 1 it may fill that part of one, whose rest others have.
    """

    gpu_share = 1.0

    def wall(self) -> float:
        """Unix time, s, as this machine's clock is set."""
        return time.time()

    def clock(self) -> float:
        """Seconds that no one sets, and that go on while the machine sleeps where the system counts them."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def token(self) -> str:
        """32 hexadecimal digits that nobody else draws."""
        return uuid4().hex

    def threads(self, count: int) -> Executor:
        """So many threads, to be closed as a context manager."""
        return ThreadPoolExecutor(count, "latentmill")

    def guard(self) -> AbstractContextManager[Any]:
        """A context that one thread at a time is in, any number of times."""
        return threading.Lock()

    def every(self, seconds: float, action: Callable[[], bool]) -> Callable[[], None]:
        """Call in the background from now on, until it answers False or the returned function is called."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(seconds) and action():
                pass

        thread = threading.Thread(target=work, daemon=True, name="latentmill-every")
        thread.start()

        def end() -> None:
            stop.set()
            thread.join(timeout=seconds)

        return end

    def process(self) -> Mapping[str, Any]:
        """Who this process is: ``host``, ``boot``, ``namespace``, ``pid``, and ``process``, when it began.

        The namespace is that which numbers of processes belong to; containers number theirs each for themselves. What
        the system does not tell is empty.
        """
        pid = os.getpid()
        return {"host": socket.gethostname(), "boot": _boot(), "namespace": _namespace(), "pid": pid,
                "process": self.began(pid)}  # fmt: skip

    def began(self, pid: int) -> str:
        """When a process began, in clock ticks since boot; empty if there is none (or no /proc to ask)."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            return ""


here = Machine()


def several(function: Callable[[T], S], items: Iterable[T], threads: int) -> Iterator[S]:
    """The function's results in the order of the items, which are taken as they are needed; some are on their way."""
    with here.threads(threads) as pool:
        rest = iter(items)
        window = deque(pool.submit(function, item) for item in islice(rest, 2 * threads))
        try:
            while window:
                yield window.popleft().result()
                window.extend(pool.submit(function, item) for item in islice(rest, 1))
        finally:
            for left in window:
                left.cancel()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
