"""Whether a worker that is slow is at work, or stuck: it says itself, whenever the driver asks how far it is.

Signs of life are rows that came in or went out, and processor time of the threads that work on rows. One that waits for
a read that never ends, or for a lock, has none of them; one that does a row for hours has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from pipeline import machine
from pipeline.patience import hosts

WINDOW_S = 10.0
"""Processor time is looked at over at least so long."""
LEAST_SHARE = 0.01
"""Of a processor: who computes less than that only looks whether there is something to do."""
TICK_S = 0.01
"""In which /proc counts."""


@dataclass(frozen=True)
class Pulse:
    """Rows through the stage in the current task, seconds since the last sign of life, and what is waited for."""

    done: int
    quiet_s: float
    waits: str = ""


class Heart:
    """Asked from a thread of its own, while others work.

    Args:
        counts: What changes with every row.
    """

    def __init__(self, counts: Callable[[], tuple[int, Hashable]]) -> None:
        self._counts = counts
        self._worker = 0
        self._start()

    def _start(self) -> None:
        self._asked = self._since = self._sign = machine.here.clock()
        self._seen, self._spent = self._counts(), self._seconds()

    def begin(self) -> None:
        """The calling thread begins a task."""
        self._worker = threading.get_native_id()
        self._start()

    def pulse(self) -> Pulse:
        """How it is."""
        now, seen = machine.here.clock(), self._counts()
        if now - self._asked > 6 * WINDOW_S:  # nobody has asked, or the machine was asleep
            self._start()
        if seen != self._seen or hosts.waits:
            self._seen, self._sign = seen, now
        if now - self._since >= WINDOW_S:
            spent = self._seconds()
            if sum(max(0.0, spent[t] - self._spent.get(t, 0.0)) for t in spent) >= LEAST_SHARE * (now - self._since):
                self._sign = now
            self._since, self._spent = now, spent
        self._asked = now
        return Pulse(seen[0], now - self._sign, hosts.waits)

    def _seconds(self) -> dict[int, float]:
        """Thread -> processor time so far, but for the one that asks; where there is no /proc, of all in one."""
        own = threading.get_native_id()
        threads = {thread.native_id or 0 for thread in threading.enumerate()} | {self._worker}
        spent = {thread: _spent(thread) for thread in threads - {0, own}}
        if spent and all(seconds is None for seconds in spent.values()):
            return {0: time.process_time()}
        return {thread: seconds for thread, seconds in spent.items() if seconds is not None}


def _spent(thread: int) -> float | None:
    """Processor time of a thread of this process, s; None if it is not to be had."""
    try:
        told = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(told[11]) + int(told[12])) * TICK_S
