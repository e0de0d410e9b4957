"""One output under faults: its job is started, hurt and started again, and in the end it has to be whole."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from benchmarks.runtime.chaos import values
from benchmarks.runtime.chaos.faults import FAULTS, delete_file
from benchmarks.runtime.chaos.world import World
from pipeline.output.dataset import Output
from pipeline.output.planfile import OutputError
from pipeline.output.verify import verify

STARTS = 6
"""So many after the last fault at most, until the job is complete."""
TRIES = 3
"""So often a fault is tried that came when there was nothing that it could hurt."""
SHARES = (0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0)
"""Of all shards, that are committed when a fault comes; then a little later."""


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run gave: step of a chain (else empty) -> rows and products."""

    rows: dict[str, pa.Table]
    products: dict[str, dict[str, str]]
    shards: int

    @staticmethod
    def of(outputs: dict[str, Output]) -> Expected:
        return Expected(
            {step: values.table(output) for step, output in outputs.items()},
            {step: values.products(output) for step, output in outputs.items()},
            sum(int(output.plan["shards"]) for output in outputs.values()),
        )


@dataclass
class Life:
    """A job and its output in a world of faults.

    Attributes:
        steps: Names of a chain's steps; ``("",)`` else.
        patience_s: Without an end and without a new record for so long, a start counts as stuck.
        told: What was done to it, what it said, and what is wrong.
    """

    world: World
    kind: str
    job: Path
    output: str
    log: Path
    chance: random.Random
    steps: tuple[str, ...] = ("",)
    patience_s: float = 1200.0
    told: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    rounded: dict[str, float] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    starts: int = 0

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        return self.world.start(self.job, self.output, self.log)

    def place(self, step: str) -> str:
        return f"{self.output}/{step}" if step else self.output

    def outputs(self) -> list[Output]:
        """Those that are planned."""
        found = []
        for step in self.steps:
            with suppress(OutputError, OSError):
                found.append(Output.open(self.place(step), self.world.options))
        return found

    def committed(self) -> int:
        with suppress(OSError, OutputError):
            return sum(1 for output in self.outputs() for _ in output.records(lambda name, error: None))
        return 0

    def some_worker(self) -> psutil.Process | None:
        """One that lives; waits for one as long as there is a driver that may start it."""
        while not (workers := self.world.workers()):
            if self.driver.poll() is not None:
                return None
            time.sleep(0.1)
        return self.chance.choice(workers)

    def wait(self, seconds: float) -> None:
        """Until then, or the driver's end."""
        with suppress(subprocess.TimeoutExpired):
            self.driver.wait(seconds)

    @contextmanager
    def ended_afterwards(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        try:
            yield
        except subprocess.TimeoutExpired:
            self.wrong.append(f"a driver has not ended in {self.patience_s:.0f} s")
            process.kill()
            process.wait()

    def suffer(self, names: list[str], shards: int) -> None:
        """Faults, one after another; a job that completes before the next is due loses a file, and is started again."""
        self.driver = self.start()
        for name in names:
            share = self.chance.choice(SHARES)
            for _ in range(TRIES):
                if self._struck(name, share * shards, shards):
                    break
                share = 0.0  # it ended too early

    def _struck(self, name: str, due: float, shards: int) -> bool:
        """Wait until a fault is due, and do it. False: there was nothing that it could hurt."""
        if self.driver.poll() is not None:
            self._start_again()
        if not self._until(due):
            return False
        self.wait(self.chance.uniform(0, 0.7 if due else 4))
        said = FAULTS[name][1](self)
        if said is not None:
            self._note(name, f"at {self.committed()} of {shards} shards: {said}")
        return said is not None

    def _start_again(self) -> None:
        """After an end. If all is done, a file is lost first, so that there is work."""
        self._heard()
        if self.driver.returncode == 0 and (said := delete_file(self)):
            self._note("delete-file", f"complete; {said}")
        self.driver = self.start()

    def _note(self, name: str, said: str) -> None:
        self.faults[name] = self.faults.get(name, 0) + 1
        self.told.append(said)

    def _until(self, shards: float) -> bool:
        """Wait until so many are committed; False: the driver has ended before."""
        while self.committed() < shards:
            if self._ended(0.1):
                return False
        return True

    def _ended(self, seconds: float) -> bool:
        self.wait(seconds)
        return self.driver.poll() is not None

    def _heard(self) -> None:
        """Note what a driver ended with."""
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        last = (said.splitlines() or [""])[-1].replace(f"{self.log.parent}/", "")
        self.told.append(f"ended with {self.driver.returncode}: {last[:300]}")

    def recover(self) -> None:
        """Started again, undisturbed, until it is complete."""
        for _ in range(STARTS):
            self._to_its_end()
            self._heard()
            self.driver = self.start()
            self._to_its_end()
            if self.driver.returncode == 0:
                self._heard()
                return
        self.wrong.append(f"not complete after {STARTS} starts: {self.told[-1]}")

    def _to_its_end(self) -> None:
        begun, seen = time.monotonic(), -1
        while not self._ended(0.5):
            if (now := self.committed()) != seen:
                begun, seen = time.monotonic(), now
            elif time.monotonic() - begun > self.patience_s:
                self.wrong.append(f"stuck at {now} shards for {self.patience_s:.0f} s")
                self.driver.kill()

    def judge(self, expected: Expected) -> None:
        """What is wrong with it now."""
        said = self.log.read_text(errors="replace")
        self.wrong += [f"a traceback: {part[-400:]}" for part in said.split("Traceback (most recent call last)")[1:2]]
        for step in self.steps:
            place = self.place(step)
            report = verify(place, self.world.options)
            self.wrong += [f"{step}: {problem}" for problem in report.problems]
            if not report.ok:
                continue
            output = Output.open(place, self.world.options)
            wrong, rounded = values.compare(expected.rows[step], values.table(output))
            self.wrong += [f"{step}: {problem}" for problem in wrong]
            self.rounded |= rounded
            made = values.products(output)
            if made != expected.products[step]:
                other = [name for name in {*made, *expected.products[step]}
                         if made.get(name) != expected.products[step].get(name)]  # fmt: skip
                (self.told if rounded else self.wrong).append(f"{step}: products differ: {sorted(other)}")

    def result(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "faults": self.faults, "starts": self.starts, "wrong": self.wrong,
            "rounded": self.rounded, "told": self.told,
        }  # fmt: skip
