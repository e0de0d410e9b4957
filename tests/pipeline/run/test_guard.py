"""A worker without Ray: stages that raise, run out of memory, lose rows or give them back twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.failures import Fault
from pipeline.output.verify import verify
from pipeline.run.guard import ContractError
from tests.support.faulty import data, run_plain, spec_for

LINES = [f"line {i}" for i in range(30)]


class Refused(RuntimeError):
    fault = Fault.BUG


class Batches:
    """Takes rows in batches, gives them back in reverse, and misbehaves as told."""

    def __init__(self, mode: str) -> None:
        self.mode, self.size, self.calls = mode, 8, list[int]()

    @staticmethod
    def describe(mode: str) -> StageInfo:
        return StageInfo((Column("size", "int64"),))

    def shrink(self) -> bool:
        self.size //= 2
        return self.size >= 1

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        if self.mode == "at once":
            raise ValueError("before any row")
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) >= self.size:
                yield from self._run(batch)
                batch = []
        yield from self._run(batch)

    def _run(self, batch: list[Row]) -> Iterator[Row]:
        if self.mode == "memory" and len(batch) > 3:
            raise MemoryError("too many")
        if self.mode == "raise" and any(row["text"] in ("line 5", "line 22") for row in batch):
            raise RuntimeError("one of these")
        if self.mode == "of no row":
            raise Refused("this device refuses")
        if self.mode == "lose":
            batch = batch[1:]
        for row in reversed(batch):
            yield ok(row, size=len(row["text"]))
        if self.mode == "twice" and batch:
            yield ok(batch[0], size=1)


def _run(tmp_path: Path, mode: str) -> pa.Table:
    stage = StageSpec("tests.pipeline.run.test_guard:Batches", {"mode": mode})
    spec = replace(spec_for(tmp_path, LINES, shard_rows=15), stage=stage)
    run_plain(spec)
    assert verify(spec.output).ok
    return data(spec.output)


def test_stage_that_raises_loses_only_the_culprits(tmp_path: Path) -> None:
    rows = _run(tmp_path, "raise").to_pylist()
    assert [i for i, row in enumerate(rows) if row["status"] == "failed"] == [5, 22]
    assert rows[5]["error"] == "RuntimeError: one of these"
    assert [row["text"] for row in rows] == LINES


def test_out_of_memory_halves_and_goes_on(tmp_path: Path) -> None:
    assert set(_run(tmp_path, "memory")["status"].to_pylist()) == {"ok"}


def test_stage_that_fails_before_any_row_fails_every_row(tmp_path: Path) -> None:
    rows = _run(tmp_path, "at once")
    assert rows["error"].to_pylist() == ["ValueError: before any row"] * 30


def test_rows_that_a_stage_loses_are_failed_rows(tmp_path: Path) -> None:
    rows = _run(tmp_path, "lose").to_pylist()
    assert [row["status"] for row in rows[:9]] == ["failed", *["ok"] * 7, "failed"]
    assert "returned nothing" in rows[0]["error"]


def test_what_says_that_it_is_of_no_row_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="this device refuses"):
        _run(tmp_path, "of no row")


def test_row_given_back_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="twice"):
        _run(tmp_path, "twice")
