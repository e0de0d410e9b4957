"""Commit, storage and lock without Ray; and the worker's handling of stages that raise or run out of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.output import commit
from pipeline.output.commit import Attempt, Record, check_attempt, write_record
from pipeline.output.lock import NAME, Lock, OutputLocked, holder
from pipeline.output.schema import table
from pipeline.output.verify import verify
from pipeline.run.guard import ContractError
from pipeline.storage import Folder
from tests.support.faulty import data, run_plain, spec_for

VECTOR = pa.list_(pa.float16(), 2)
SCHEMA = pa.schema([("id", pa.string()), ("v", VECTOR), ("status", pa.string()), ("error", pa.string())])
LINES = [f"line {i}" for i in range(30)]


def _record(shard: int, token: str) -> Record:
    return Record(shard, token, f"{token}.parquet", 1, "", 1, 0, 0.0, 0.0, "here")


def test_first_record_stands(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    assert write_record(folder, _record(3, "a")).attempt == "a"
    assert write_record(folder, _record(3, "b")).attempt == "a"
    assert [p.name for p in (tmp_path / commit.RECORDS).iterdir()] == ["000003.json"]


def test_a_cut_attempt_is_noticed(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    attempt = Attempt(folder, "x.parquet", SCHEMA)
    attempt.add(table([{"id": "a", "v": np.ones(2), "status": "ok", "error": None}], SCHEMA))
    size, _ = attempt.close()
    check_attempt(folder, "x.parquet", size, 1)
    path = tmp_path / commit.ATTEMPTS / "x.parquet"
    for content in (path.read_bytes()[:-9], path.read_bytes()[:-9] + b"x" * 9):
        path.write_bytes(content)
        with pytest.raises(commit.CommitError):
            check_attempt(folder, "x.parquet", size, 1)


def test_values_that_do_not_fit_fail_their_row_alone() -> None:
    values = [[1, 2], [1, 2, 3], [1, 1e6], None]
    rows = [{"id": str(i), "v": v, "status": "ok", "error": None} for i, v in enumerate(values)]
    stored = table(rows, SCHEMA).to_pylist()
    assert [row["status"] for row in stored] == ["ok", "failed", "failed", "ok"]
    assert stored[0]["v"] == [1, 2]
    assert "3 values, expected 2" in stored[1]["error"]
    assert "overflows" in stored[2]["error"]


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    script = f"""
import os, signal
from pipeline.output.lock import Lock
from pipeline.storage import Folder
Lock(Folder.at({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    left = holder(folder)
    assert left is not None
    assert left["stale"]
    lock = Lock(folder)
    with pytest.raises(OutputLocked, match=str(os.getpid())):
        Lock(folder)
    lock.release()
    assert holder(folder) is None


def test_lock_from_another_machine_counts_by_its_age(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    Lock(folder).release()
    content = {"host": "elsewhere", "boot": "b", "pid": 1, "process": "1", "token": "t", "renewed": 0}
    folder.write(NAME, json.dumps(content).encode())
    assert holder(folder)["stale"]  # type: ignore[index]
    folder.write(NAME, json.dumps({**content, "renewed": 1e12}).encode())
    with pytest.raises(OutputLocked, match="elsewhere"):
        Lock(folder)


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
        if self.mode == "lose":
            batch = batch[1:]
        for row in reversed(batch):
            yield ok(row, size=len(row["text"]))
        if self.mode == "twice" and batch:
            yield ok(batch[0], size=1)


def _run(tmp_path: Path, mode: str) -> pa.Table:
    stage = StageSpec("tests.pipeline.output.test_commit:Batches", {"mode": mode})
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


def test_row_given_back_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="twice"):
        _run(tmp_path, "twice")
