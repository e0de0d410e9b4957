"""Rows of several shards in one call of the stage: none waits for the last ones of another, and none is another's."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.contract import Column, Row, StageInfo, StageSpec, failed, ok
from pipeline.input.source import SourceError
from pipeline.output.commit import ATTEMPTS, Record
from pipeline.output.dataset import Output
from pipeline.output.planfile import read_shards
from pipeline.run.draft import draft
from pipeline.run.driver import _worker_job
from pipeline.run.guard import Poisoned
from pipeline.run.plan import write_plan
from pipeline.run.tasks import Resources, Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder
from tests.support.faulty import spec_for

SHARD, SHARDS = 6, 8
LINES = [f"line {i}" for i in range(SHARD * SHARDS)]
SLOTS = 4


class Slots:
    """Slots that rows stay in for as many steps as their lines' numbers tell; says how full they were."""

    holds = 2 * SLOTS

    def __init__(self, mode: str = "") -> None:
        self.mode, self.steps, self.busy, self.calls = mode, 0, 0, 0
        if mode == "apart":
            self.holds = 0

    @staticmethod
    def describe(mode: str = "") -> StageInfo:
        return StageInfo((Column("number", "int64"), Column("steps", "int64")))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        self.calls += 1
        source, held = iter(rows), dict[str, list[int]]()
        inside = dict[str, Row]()
        while True:
            while len(held) < SLOTS and (row := next(source, None)) is not None:
                number = int(row["text"].split()[1])
                inside[row["id"]], held[row["id"]] = row, [1 + 7 * number % 11, number]
            if not held:
                return
            if self.mode == "device" and any(number == 20 for _, number in held.values()):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if self.mode == "raise" and any(number in (5, 22) for _, number in held.values()):
                raise ValueError("one of these")
            self.steps, self.busy = self.steps + SLOTS, self.busy + len(held)
            for left in held.values():
                left[0] -= 1
            for own in [own for own, left in held.items() if not left[0]]:
                number, row = held.pop(own)[1], inside.pop(own)
                yield failed(row, "odd") if number % 10 == 9 else ok(row, number=number, steps=1 + 7 * number % 11)


class Bench:
    """A planned run and its worker."""

    def __init__(self, folder: Path, mode: str = "", lines: list[str] = LINES) -> None:
        folder.mkdir(exist_ok=True)
        stage = StageSpec("tests.pipeline.run.test_stream:Slots", {"mode": mode})
        spec = replace(spec_for(folder, lines, shard_rows=SHARD), stage=stage)
        write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
        self.output = Output.open(spec.output)
        self.worker = Worker(_worker_job(spec, self.output, Resources()))
        self.tasks = [Task.of(shard) for shard in read_shards(self.output.own)]
        self.stage: Slots = self.worker.stage  # type: ignore[assignment]

    def all(self, tasks: list[Task] | None = None) -> list[Record | BaseException]:
        """What becomes of tasks that are all in hand at once."""
        tasks, stream, begin = tasks or self.tasks, self.worker._stream, threading.Event()
        stream._thread.submit(begin.wait)  # the stage waits until all are there, in this order
        with ThreadPoolExecutor(len(tasks)) as threads:
            done = []
            for number, task in enumerate(tasks, 1):
                done.append(threads.submit(self.worker.process, task))
                with stream._changed:
                    stream._changed.wait_for(lambda: len(stream._open) == number)  # noqa: B023
            begin.set()
            return [one.exception() or one.result() for one in done]  # type: ignore[misc]

    def rows(self, record: Record | BaseException) -> list[Row]:
        assert isinstance(record, Record), record
        rows: list[Row] = pq.read_table(f"{self.output.path}/{ATTEMPTS}/{record.file}").to_pylist()
        return rows


def test_each_shard_has_its_own_rows_whatever_is_beside_them(tmp_path: Path) -> None:
    alone, joined = Bench(tmp_path / "a", "apart"), Bench(tmp_path / "b")
    apart = [alone.rows(alone.worker.process(task)) for task in alone.tasks]  # type: ignore[arg-type]
    together = [joined.rows(record) for record in joined.all()]
    assert together == apart
    assert [row["text"] for rows in together for row in rows] == LINES
    assert [row["status"] for row in together[1]] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert alone.stage.calls == SHARDS


def test_slots_stay_full_over_the_borders_of_shards(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(200)]
    alone, joined = Bench(tmp_path / "a", "apart", lines), Bench(tmp_path / "b", "", lines)
    alone.all()
    joined.all()
    assert joined.stage.calls == 1
    assert joined.stage.busy == alone.stage.busy == sum(1 + 7 * number % 11 for number in range(len(lines)))
    assert alone.stage.busy / alone.stage.steps < 0.75
    assert joined.stage.busy / joined.stage.steps >= 0.97


def test_rows_that_the_stage_raises_on_are_their_shards_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "raise")
    rows = [row for record in bench.all() for row in bench.rows(record)]
    assert [int(row["text"].split()[1]) for row in rows if row["error"] == "ValueError: one of these"] == [5, 22]
    assert [row["text"] for row in rows] == LINES


def test_a_device_that_is_lost_ends_every_task_in_hand_and_no_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "device")
    assert all(isinstance(record, Record) for record in bench.all(bench.tasks[:2]))
    ended = bench.all(bench.tasks[2:])
    assert any(isinstance(end, Poisoned) for end in ended)
    assert all(isinstance(end, (Poisoned, Record)) for end in ended)
    assert isinstance(ended[1], Poisoned)  # that of line 20


def test_an_input_that_cannot_be_read_ends_its_own_task(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    span = bench.tasks[3].spans[0]
    bad = replace(bench.tasks[3], spans=(replace(span, path=f"{span.path}.gone"),))
    ended = bench.all([*bench.tasks[:3], bad, *bench.tasks[4:]])
    assert isinstance(ended[3], (SourceError, OSError))
    assert [row["text"] for i, end in enumerate(ended) if i != 3 for row in bench.rows(end)] == [
        line for i, line in enumerate(LINES) if i // SHARD != 3
    ]
    assert [row["text"] for row in bench.rows(bench.worker.process(bench.tasks[3]))] == LINES[18:24]  # type: ignore[arg-type]


def test_a_task_given_twice_waits_for_its_rows_to_be_out(tmp_path: Path) -> None:
    """Two rows of one id are never in the stage at once, whichever tasks they are of."""
    bench = Bench(tmp_path)
    first, second = bench.all([bench.tasks[0], replace(bench.tasks[0], shard=1)])
    assert bench.rows(first) == bench.rows(second)


def test_a_task_whose_rows_nobody_takes_leaves_the_others_be(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    rows = bench.worker._stream.rows(bench.tasks[0])
    next(rows)
    rows.close()  # others of it are in the stage, and come out of it for nobody
    again = [bench.rows(bench.worker.process(task)) for task in [*bench.tasks[1:], bench.tasks[0]]]  # type: ignore[arg-type]
    assert [row["text"] for rows in again for row in rows] == [*LINES[SHARD:], *LINES[:SHARD]]


@pytest.mark.parametrize("mode", ["", "apart"])
def test_what_a_stage_makes_waits_for_a_writer_that_is_slow(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.stream.UNTAKEN", 2)
    bench = Bench(tmp_path, mode)
    rows = bench.worker._stream.rows(bench.tasks[0])
    next(rows)
    assert len(list(rows)) == SHARD - 1
