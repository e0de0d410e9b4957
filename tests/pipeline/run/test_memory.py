"""What running out of memory taught one worker, the others know, those that come later, and a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pipeline.contract import Column, Fit, Row, StageInfo, StageSpec, ok
from pipeline.output.dataset import Output, Tally
from pipeline.output.planfile import read_shards
from pipeline.run.dispatch import Dispatcher
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import Resources, _worker_job
from pipeline.run.memory import FILE, Memory
from pipeline.run.plan import write_plan
from pipeline.run.pool import _Actor
from pipeline.run.tasks import Outcome, Task
from pipeline.storage import Folder
from stages.engine.passthrough import in_batches
from stages.engine.room import Rooms
from tests.support.faulty import texts


class Cramped:
    """Text -> its length, eight rows at once on a device that takes `most` of them."""

    most: ClassVar[int] = 0
    refused: ClassVar[list[int]] = []

    def __init__(self, slots: int = 8, device: str = "cpu") -> None:
        self.slots, self.relieved = slots, False
        self.rooms = Rooms(device, relief=self._relief)

    @staticmethod
    def describe(slots: int = 8, device: str = "cpu") -> StageInfo:
        return StageInfo((Column("length", "int64"),))

    def _relief(self, work: str) -> bool:
        self.relieved, had = True, self.relieved
        return not had

    def _lengths(self, rows: list[Row]) -> list[int]:
        if len(rows) > self.most + self.relieved:
            self.refused.append(len(rows))
            raise torch.OutOfMemoryError
        return [len(row["text"]) for row in rows]

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        def work(batch: list[Row]) -> Iterator[Row]:
            parts = self.rooms["lengths"].parts(len(batch), lambda part: self._lengths(batch[part]))
            for row, length in zip(batch, (length for part in parts for length in part), strict=True):
                yield ok(row, length=length)

        return in_batches(rows, self.slots, work)


class _Pool:
    """Workers in this process, one task after the other each. After so many tasks, one dies and another comes."""

    build_failures, build_problem, active_rows, hungry, deaths = 0, "", 0, False, 0

    def __init__(self, job: Any, workers: int, lives: int = 1000) -> None:
        self._job, self._lives, self._done = job, lives, 0
        self._actors = [_Actor(job) for _ in range(workers)]
        self._given: list[Task] = []
        self.size = self.ready = workers
        self.lost: list[str] = []

    def room(self) -> int:
        return self.size

    @property
    def idle(self) -> int:
        return self.size - len(self._given)

    def grow(self, size: int) -> None: ...

    def ask(self) -> None: ...

    def give(self, task: Task) -> None:
        self._given.append(task)

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """One worker's task ends, before the others have begun theirs."""
        task, self._done = self._given.pop(0), self._done + 1
        if self._done % self._lives == 0:
            self._actors[0] = _Actor(self._job)
        actor = self._actors[self._done % len(self._actors)]
        return [(task, actor.process(task))]


class _Quiet:
    lost = False

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cramped, "most", 2)
    monkeypatch.setattr(Cramped, "refused", [])


def spec_in(folder: Path, **params: Any) -> RunSpec:
    stage = StageSpec("tests.pipeline.run.test_memory:Cramped", params)
    spec = RunSpec(stage, texts(folder, ["x" * n for n in range(48)]), str(folder / "out"), shard_rows=8)
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill", {}), 0.0)
    return spec


def run_some(spec: RunSpec, shards: range, workers: int = 3, lives: int = 1000) -> list[str]:
    """A driver that does some of the shards, and what it says."""
    output, quiet, told = Output.open(spec.output), _Quiet(), list[str]()
    quiet.running = lambda *args: told.extend(args[4:])  # type: ignore[attr-defined]
    todo = iter([Task.of(shard) for shard in read_shards(output.own) if shard.index in shards])
    pool: Any = _Pool(_worker_job(spec, output, Resources()), workers, lives)
    memory, other = Memory(output, spec.stage, 0), [quiet] * 3
    Dispatcher(pool, todo, Tally(), *other, 0.0, len(shards), 1, quiet, memory).run()  # type: ignore[arg-type]
    return told


def test_one_worker_runs_out_for_all_of_them(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    told = run_some(spec, range(4), workers=1)
    assert Cramped.refused == [8, 4]
    assert told[-1] == "memory ran out in lengths on cpu: 2 at once from now on, in all workers"
    assert json.loads((tmp_path / f"out/{FILE}").read_text())["fits"] == {"lengths on cpu": [2, 0]}
    run_some(spec, range(4, 6))  # a run that goes on, with three workers
    assert Cramped.refused == [8, 4]
    rows = [row for table in Output.open(spec.output).tables() for row in table.to_pylist()]
    assert [row["length"] for row in rows] == list(range(48))


def test_workers_of_one_run_learn_of_each_other(tmp_path: Path) -> None:
    """The three that began together had to find out by themselves; who comes in a dead one's place had not."""
    spec = spec_in(tmp_path)
    run_some(spec, range(6), lives=4)
    assert sorted(Cramped.refused) == [4, 4, 4, 8, 8, 8]


def test_what_one_row_had_to_have_done_for_it_is_done_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cramped, "most", 0)
    spec = spec_in(tmp_path)
    run_some(spec, range(3), workers=1)
    assert Cramped.refused == [8, 4, 2, 1]
    assert json.loads((tmp_path / f"out/{FILE}").read_text())["fits"] == {"lengths on cpu": [1, 1]}
    run_some(spec, range(3, 6), workers=2)
    assert Cramped.refused == [8, 4, 2, 1]


def test_other_settings_and_other_devices_learn_for_themselves(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    run_some(spec, range(2), workers=1)
    output, others = Output.open(spec.output), replace(spec.stage, params={"slots": 4})
    assert Memory(output, spec.stage, 0).fits == {"lengths on cpu": Fit(2)}
    assert not Memory(output, others, 0).fits
    assert not Memory(output, spec.stage, 0.5).fits
    rooms = Rooms("meta")
    rooms.heed(Memory(output, spec.stage, 0).fits)
    assert not rooms


def test_the_smallest_that_any_worker_found_holds(tmp_path: Path) -> None:
    memory = Memory(Output.open(spec_in(tmp_path).output), StageSpec("tests.pipeline.run.test_memory:Cramped"), 0)
    assert len([*memory.add({"a on cpu": Fit(4)})]) == 1
    assert not [*memory.add({"a on cpu": Fit(8)})]
    assert len([*memory.add({"a on cpu": Fit(1, relieved=1), "b on cpu": Fit(3)})]) == 2
    assert memory.fits == {"a on cpu": Fit(1, 1), "b on cpu": Fit(3)}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": 1}', '{"stage": 1, "fits": {"a": 3}}'])
def test_a_damaged_file_is_no_file(tmp_path: Path, content: str) -> None:
    spec = spec_in(tmp_path)
    (tmp_path / f"out/{FILE}").write_text(content)
    memory = Memory(Output.open(spec.output), spec.stage, 0)
    assert not memory.fits
    assert len([*memory.add({"a on cpu": Fit(4)})]) == 1
    assert Memory(Output.open(spec.output), spec.stage, 0).fits == {"a on cpu": Fit(4)}
