"""A worker that is slow is told from one that is stuck."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline import machine
from pipeline.run import pulse
from pipeline.run.pulse import Heart


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "WINDOW_S", 0.2)


def _watched(work: object, seconds: float, counts: list[int]) -> float:
    """How long a worker has been quiet in the end, asked twenty times a second."""
    heart = Heart(lambda: (counts[0], counts[1]))
    ready, over = threading.Event(), threading.Event()

    def process() -> None:
        heart.begin()
        ready.set()
        work(over)  # type: ignore[operator]

    thread = threading.Thread(target=process, daemon=True)
    thread.start()
    ready.wait()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        quiet = heart.pulse().quiet_s
        time.sleep(0.05)
    over.set()
    thread.join()
    return quiet


def test_a_long_row_is_at_work() -> None:
    """It computes, and says nothing for as long as it takes."""

    def compute(over: threading.Event) -> None:
        while not over.is_set():
            sum(range(10_000))

    assert _watched(compute, 1.5, [0, 0]) < 0.8


def test_a_read_that_never_ends_is_stuck() -> None:
    def wait(over: threading.Event) -> None:
        while not over.wait(0.2):  # as who waits looks up now and then
            pass

    assert _watched(wait, 1.5, [0, 0]) > 1.2


def test_rows_that_come_in_or_go_out_are_signs_of_life() -> None:
    for place in (0, 1):
        counts = [0, 0]

        def wait(over: threading.Event, counts: list[int] = counts, place: int = place) -> None:
            while not over.wait(0.3):
                counts[place] += 1

        assert _watched(wait, 1.5, counts) < 0.8


def test_a_machine_that_slept_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(machine.Machine):
        now = 0.0

        def clock(self) -> float:
            return self.now

    monkeypatch.setattr(machine, "here", clock := Clock())
    heart = Heart(lambda: (0, 0))
    for now in (0.5, 1.0, 3600.0):
        clock.now = now
        quiet = heart.pulse().quiet_s
    assert quiet == 0.0
