"""Rows of several shards in one call of the stage: none waits for the last ones of another, and none is another's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.contract import Column, Row, StageInfo, StageSpec, failed, ok
from pipeline.input.source import Source, SourceError
from pipeline.output.commit import ATTEMPTS, Record, read_summary
from pipeline.run.draft import RunSpec
from pipeline.run.guard import Poisoned
from pipeline.run.tasks import Again, Task
from tests.support.faulty import spec_for
from tests.support.in_hand import Planned

SHARD, SHARDS = 6, 8
LINES = [f"line {i}" for i in range(SHARD * SHARDS)]
SLOTS = 4


class Numbers:
    """The numbers of the rows that are well, as they come."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def add(self, row: Row) -> None:
        if row["status"] == "ok":
            self.seen.append(row["number"])

    def summary(self) -> dict[str, np.ndarray]:
        return {"numbers": np.array(self.seen)}


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

    def tally(self) -> Numbers:
        return Numbers()

    def take_summary(self) -> dict[str, np.ndarray]:
        return {"calls": np.array(self.calls)}

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
                steps = 1 << 70 if self.mode == "wide" and number % 5 == 2 else 1 + 7 * number % 11
                yield failed(row, "odd") if number % 10 == 9 else ok(row, number=number, steps=steps)


class Bench(Planned):
    """A planned run of `Slots` and its worker."""

    def __init__(self, folder: Path, mode: str = "", lines: list[str] = LINES) -> None:
        folder.mkdir(exist_ok=True)
        stage = StageSpec("tests.pipeline.run.test_stream:Slots", {"mode": mode})
        super().__init__(replace(spec_for(folder, lines, shard_rows=SHARD), stage=stage))
        self.stage: Slots = self.worker.stage  # type: ignore[assignment]


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


def numbers(bench: Planned, record: Record | BaseException) -> list[int]:
    """What a task's summaries tell of its rows."""
    assert isinstance(record, Record), record
    return [int(n) for name in record.summary for n in read_summary(bench.output.folder, name)["numbers"]]


@pytest.mark.parametrize("mode", ["", "apart", "raise", "wide"])
def test_a_summary_is_of_its_own_shards_rows_whatever_is_beside_them(tmp_path: Path, mode: str) -> None:
    bench = Bench(tmp_path, mode)
    for record in bench.all():
        well = [row["number"] for row in bench.rows(record) if row["status"] == "ok"]
        assert sorted(numbers(bench, record)) == well
        assert len(well) == record.rows_ok < SHARD or mode != "wide"


def test_a_kept_value_that_does_not_fit_fails_its_row_before_the_stage_has_it(tmp_path: Path) -> None:
    """Before: the row was counted, then refused by the writer; a reference of it could never be finished."""
    rows = [{"id": f"r{i}", "text": LINES[i], "label": "x", "number": i} for i in range(SHARD)]
    rows[3] |= {"label": "half of a pair: \ud83d"}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = StageSpec("tests.pipeline.run.test_stream:Slots", {"mode": ""})
    source = Source((str(tmp_path / "in.jsonl"),), columns={"text": "text"}, id="id")
    planned = Planned(RunSpec(stage, source, str(tmp_path / "out"), keep=("label",), shard_rows=SHARD))
    (record,) = planned.all()
    done = planned.rows(record)
    assert [row["status"] for row in done] == ["ok"] * 3 + ["failed"] + ["ok"] * 2
    assert "column 'label'" in done[3]["error"]
    assert [row["label"] for row in done] == ["x"] * 3 + [None] + ["x"] * 2
    assert sorted(numbers(planned, record)) == [0, 1, 2, 4, 5]
    assert planned.worker.stage.busy == sum(1 + 7 * i % 11 for i in (0, 1, 2, 4, 5))  # type: ignore[attr-defined]


def test_an_attempt_that_failed_leaves_nothing_in_the_summaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    before = bench.worker._writer.write

    def refused(task: Task, *given: object) -> object:
        done = before(task, *given)  # type: ignore[arg-type]
        if task.shard in (1, 4):
            raise OSError("the store is away")
        return done

    monkeypatch.setattr(bench.worker._writer, "write", refused)
    ended = bench.all()
    assert [isinstance(end, OSError) for end in ended] == [shard in (1, 4) for shard in range(SHARDS)]
    monkeypatch.undo()
    ended[1], ended[4] = bench.all([bench.tasks[1], bench.tasks[4]])
    told = Counter(number for record in ended for number in numbers(bench, record))
    assert told == Counter(i for i in range(len(LINES)) if i % 10 != 9)


def test_rows_done_again_and_parts_of_a_shard_are_told_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "raise")
    first, *_ = bench.all()
    assert isinstance(first, Record)
    assert sorted(numbers(bench, first)) == [0, 1, 2, 3, 4]
    bench.stage.mode = ""
    again = Again(f"{ATTEMPTS}/{first.file}", first.size, 1, first.summary, first.summary_bytes)
    (second,) = bench.all([replace(bench.tasks[0], again=again)])
    assert sorted(numbers(bench, second)) == [0, 1, 2, 3, 4, 5]
    task = bench.tasks[2]
    pieces = bench.all([replace(task, stop=4, whole=False), replace(task, start=4, whole=False)])
    whole = bench.worker.process(replace(task, pieces=tuple(pieces)))  # type: ignore[arg-type]
    assert sorted(numbers(bench, whole)) == list(range(12, 18))
