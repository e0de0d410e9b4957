"""Turns the counts of a run into snapshots of its progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from pipeline import machine
from pipeline.output.dataset import Output, Tally
from pipeline.output.progress import Phase, Progress

TICK_S = 0.5
SAVE_S = 5.0
SPEED_WINDOW_S = 60.0


class Reporter:
    """Turns counts into `Progress` snapshots, for the caller and for the output folder."""

    def __init__(self, output: Output | None, tell: Callable[[Progress], None] | None, wanted: int | None) -> None:
        self.output, self._tell, self._wanted = output, tell, wanted or 0
        self._begun = machine.here.clock()
        self._saved = self._shown = 0.0
        self._history: deque[tuple[float, int]] = deque()
        self._last = Progress("planning")

    @property
    def seconds(self) -> float:
        return machine.here.clock() - self._begun

    def phase(self, phase: Phase, tally: Tally | None = None, message: str | None = None) -> None:
        self._emit(self._snapshot(phase, tally, 0, 0, message), True)

    def running(self, tally: Tally, active: int, workers: int, wanted: int, message: str | None = None) -> None:
        now = machine.here.clock()
        if message is None and now - self._shown < TICK_S:
            return
        self._wanted = wanted
        self._emit(self._snapshot("running", tally, active, workers, message), False)

    def _snapshot(self, phase: Phase, tally: Tally | None, active: int, workers: int, message: str | None) -> Progress:
        last, now = self._last, machine.here.clock()
        if tally is None:
            return replace(last, phase=phase, seconds=self.seconds, message=message)
        plan = self.output.plan if self.output is not None else {}
        done = tally.rows + active
        self._history.append((now, done))
        while self._history[0][0] < now - SPEED_WINDOW_S:
            self._history.popleft()
        then, before = self._history[0]
        speed = max(0.0, (done - before) / (now - then)) if now > then else 0.0
        rows = int(plan.get("rows", 0))
        return Progress(
            phase=phase, rows=rows, rows_ok=tally.ok, rows_failed=tally.failed,
            rows_duplicate=tally.duplicates, rows_active=active,
            shards=int(plan.get("shards", 0)), shards_done=tally.shards, workers=workers, workers_wanted=self._wanted,
            seconds=self.seconds, rows_per_second=speed, seconds_left=(rows - done) / speed if speed else None,
            message=message,
        )  # fmt: skip

    def _emit(self, progress: Progress, save: bool) -> None:
        now = machine.here.clock()
        self._last = progress if progress.message is None else replace(progress, message=None)
        self._shown = now
        if self._tell is not None:
            self._tell(progress)
        if self.output is not None and (save or now - self._saved > SAVE_S):
            self._saved = now
            with suppress(OSError):  # the store is away, or the disk full: the next turn tries again
                self.output.save_progress(self._last)
