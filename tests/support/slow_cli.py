"""The command ``latentmill`` with one more kind of job, which takes its time: ``python -m tests.support.slow_cli``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Literal

from jobs.schema import registry
from jobs.schema.base import RowJob
from pipeline.contract import Column, Row, StageInfo, StageSpec, ok


class Slow(RowJob):
    """Counts letters, slowly."""

    job: Literal["slow"] = "slow"
    pause: float = 0.0
    """Seconds a row."""

    def stage(self) -> StageSpec:
        return StageSpec("tests.support.slow_cli:Letters", {"pause": self.pause})


class Letters:
    """The length of a text, after a pause."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    @staticmethod
    def describe(pause: float) -> StageInfo:
        return StageInfo((Column("length", "int64"),))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            time.sleep(self.pause)
            yield ok(row, length=len(row["text"]))


if __name__ == "__main__":
    from jobs.commands.cli import main

    registry.KINDS["slow"] = "tests.support.slow_cli:Slow"
    main()
