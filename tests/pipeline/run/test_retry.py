"""Rows that failed are done again, in their places and once, whatever dies meanwhile; all others stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.contract import Column, Row, StageInfo, StageSpec, failed, ok
from pipeline.input.source import Source
from pipeline.output.commit import RECORDS, Record
from pipeline.output.dataset import Output
from pipeline.output.failed import failed_rows
from pipeline.output.planfile import read_shards
from pipeline.output.verify import verify
from pipeline.run.draft import RunSpec
from pipeline.run.driver import Resources, RunResult, _worker_job, run
from pipeline.run.plan import PlanMismatch
from pipeline.run.tasks import Again, Piece, Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder, Upload
from tests.support.faulty import data, spec_for
from tests.support.in_process import without_ray
from tests.support.plain_stages import spec_of

LINES = [f"line {i}" for i in range(20)]


class Moody:
    """Text -> its length. What stands in the file ``bad`` fails; whatever it is given it notes in ``seen``."""

    def __init__(self, orders: str) -> None:
        self.orders, self.count = Path(orders), 0

    @staticmethod
    def describe(orders: str) -> StageInfo:
        return StageInfo((Column("length", "int64"), Column("vector", "tensor", (2,), "float16")))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        bad = (self.orders / "bad").read_text().splitlines()
        for row in list(rows)[::-1]:  # in any order
            with (self.orders / "seen").open("a") as seen:
                seen.write(row["id"] + "\n")
            if row["text"] in bad:
                yield failed(row, f"not now ({len(bad)})")
                continue
            self.count += 1
            vector = np.random.default_rng(list(row["id"].encode())).standard_normal(2)
            yield ok(row, length=len(row["text"]), vector=vector)

    def take_summary(self) -> dict[str, np.ndarray]:
        count, self.count = self.count, 0
        return {"count": np.array([count])}


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    without_ray(monkeypatch)
    stage = StageSpec("tests.pipeline.run.test_retry:Moody", {"orders": str(tmp_path / "orders")})
    return replace(spec_for(tmp_path, LINES, shard_rows=5), stage=stage)


def start(spec: RunSpec, bad: Iterable[str] = (), **options: Any) -> tuple[RunResult, list[str]]:
    """A start while some lines are bad: the result, and the ids that the stage was given."""
    orders = Path(spec.stage.params["orders"])
    (orders / "bad").write_text("\n".join(bad))
    (orders / "seen").write_text("")
    result = run(spec, max_failed_fraction=1.0, **options)
    return result, sorted((orders / "seen").read_text().split("\n")[:-1])


def undisturbed(spec: RunSpec) -> Any:
    plain = replace(spec, output=f"{spec.output}-plain")
    start(plain)
    return data(plain.output)


BAD = ["line 1", "line 3", "line 12"]
IDS = ["in.txt#1", "in.txt#12", "in.txt#3"]


def test_failed_rows_are_done_again_in_their_places(moody: RunSpec) -> None:
    expected = undisturbed(moody)
    first, _ = start(moody, BAD)
    assert (first.state, first.ok, first.failed) == ("complete", 17, 3)
    untouched = {path.name: path.stat().st_mtime_ns for path in Path(moody.output).glob("data/part-*")}
    assert start(moody)[1] == []  # without being asked, nothing is
    again, seen = start(moody, ["line 3"], retry_failed=True)
    assert (again.state, again.ok, again.failed, again.resumed) == ("complete", 19, 1, 2)
    assert seen == IDS
    assert [(row.id, row.shard, row.error) for row in failed_rows(Output.open(moody.output))] == [
        ("in.txt#3", 0, "not now (1)")  # the reason of the last time
    ]
    last, seen = start(moody, retry_failed=True)
    assert (last.state, last.ok, last.failed, seen) == ("complete", 20, 0, ["in.txt#3"])
    assert data(moody.output).equals(expected)
    assert verify(moody.output).ok, verify(moody.output).problems
    assert sum(int(s["count"][0]) for s in Output.open(moody.output).summaries()) == 20
    now = {path.name: path.stat().st_mtime_ns for path in Path(moody.output).glob("data/part-*")}
    assert [now[name] == untouched[name] for name in sorted(now)] == [False, True, False, True]
    assert not list(Path(moody.output).glob("_latentmill/set-aside/*"))
    assert start(moody, retry_failed=True)[1] == []
    assert len(list((Path(moody.output) / RECORDS).iterdir())) == 4  # those of earlier generations have gone


def test_a_run_that_too_many_failures_stopped_goes_on(moody: RunSpec) -> None:
    expected = undisturbed(moody)
    orders = Path(moody.stage.params["orders"])
    (orders / "bad").write_text("\n".join(LINES[:7]))

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.run.driver.publish", dies)
        assert run(moody, max_failed_fraction=1.0).state == "interrupted"
    result, seen = start(moody, retry_failed=True)
    assert (result.state, result.failed, len(seen)) == ("complete", 0, 7)
    assert data(moody.output).equals(expected)


class Crash(BaseException):
    """The process is no more."""


def crashing(patch: pytest.MonkeyPatch, at: int, after: bool) -> list[str]:
    """From the operation of this number on, a folder does nothing any more; returns the names of what it did."""
    done: list[str] = []
    changes = [(Folder, name) for name in ("begin", "write", "create", "move", "copy", "remove", "remove_all")]
    for kind, name in (*changes, (Upload, "close")):
        real = getattr(kind, name)

        def operation(self: Any, *args: Any, name: str = name, real: Callable[..., Any] = real, **rest: Any) -> Any:
            if len(done) > at:
                raise Crash
            done.append(" ".join([name, *map(str, args[:1])]))
            if len(done) > at and not after:
                raise Crash
            result = real(self, *args, **rest)
            if len(done) > at:
                raise Crash
            return result

        patch.setattr(kind, name, operation)
    return done


def crashes(output: str, after: bool, act: Callable[[], Any]) -> Iterator[tuple[int, str]]:
    """The folder as `act` leaves it where it dies at its first operation, its second, ...: their numbers and names."""
    saved = Path(f"{output}-saved")
    shutil.copytree(output, saved)
    for at in range(200):
        shutil.rmtree(output)
        shutil.copytree(saved, output)
        with pytest.MonkeyPatch.context() as patch:
            done = crashing(patch, at, after)
            try:
                act()
            except Crash:
                pass
            else:
                assert len(done) <= at
                return
        yield at, done[-1]


@pytest.mark.fault
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_operation_loses_and_doubles_nothing(
    moody: RunSpec, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    expected = undisturbed(moody)
    start(moody, BAD)
    monkeypatch.setattr("pipeline.output.lock._alive", lambda content: False)
    operations = list[str]()
    for at, last in crashes(moody.output, after, lambda: start(moody, retry_failed=True)):
        operations.append(last)
        plain = at % 2  # whether the next start is told to try again or just to go on: what is committed stays
        result, seen = start(moody, retry_failed=not plain)
        assert result.state == "complete", (last, result.reason)
        assert set(seen) <= set(IDS)
        report = verify(moody.output)
        assert report.ok, (last, report.problems)
        start(moody, retry_failed=True)
        assert data(moody.output).equals(expected), last
        assert sum(int(s["count"][0]) for s in Output.open(moody.output).summaries()) == 20
    assert 20 < len(operations) < 200


def test_two_workers_that_retry_one_shard_commit_it_once(moody: RunSpec) -> None:
    start(moody, BAD)
    (Path(moody.stage.params["orders"]) / "bad").write_text("")
    output = Output.open(moody.output)
    shard, record = next(read_shards(output.own)), next(output.records())
    again = Again(output.locate(record) or "", record.size, 1, record.summary, record.summary_bytes)
    task = Task(shard.index, shard.spans, 0, shard.rows, again=again)
    job = replace(_worker_job(moody, output, Resources()), epoch=99)
    first, second = Worker(job).process(task), Worker(job).process(task)
    assert first == second
    assert isinstance(first, Record)
    assert (first.generation, first.rows_ok, first.name[-8:]) == (1, 5, ".g1.json")


def test_a_shard_that_is_retried_in_pieces(moody: RunSpec) -> None:
    """Its workers died: halves, one of them a row that is to blame."""
    expected = undisturbed(moody)
    start(moody, BAD)
    (Path(moody.stage.params["orders"]) / "bad").write_text("")
    output = Output.open(moody.output)
    shard, record = next(read_shards(output.own)), next(output.records())
    again = Again(output.locate(record) or "", record.size, 1, record.summary, record.summary_bytes)
    worker = Worker(replace(_worker_job(moody, output, Resources()), epoch=99))
    whole = Task(shard.index, shard.spans, 0, shard.rows, again=again)
    cuts = [(0, 1, None), (1, 2, None), (2, 3, "kills"), (3, 4, "kills"), (4, 5, None)]
    pieces = [worker.process(replace(whole, start=a, stop=b, whole=False, condemned=c)) for a, b, c in cuts]
    assert all(isinstance(piece, Piece) for piece in pieces)
    made = worker.process(replace(whole, pieces=tuple(pieces)))  # type: ignore[arg-type]
    assert isinstance(made, Record)
    assert (made.rows_ok, made.rows_failed, made.generation) == (4, 1, 1)
    table = next(Output.open(moody.output).tables())
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "failed", "ok"]  # a row that was well stays so
    assert table["error"].to_pylist()[3] == "kills"
    for place in (0, 1, 2, 4):
        assert table.slice(place, 1).equals(expected.slice(place, 1))


def test_a_wider_allow_lets_the_failed_rows_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    for folder in ("rows", "pictures"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / f"pictures/{number}.png")
    lines = [json.dumps({"image": f"../pictures/{number}.png"}) for number in range(3)]
    (tmp_path / "rows/in.jsonl").write_text("\n".join(lines) + "\n")
    spec = spec_of(tmp_path / "rows/in.jsonl", tmp_path / "out", stage="Captioned")
    first = run(spec, max_failed_fraction=1.0)
    assert (first.state, first.failed) == ("complete", 3)
    assert "input: {allow:" in next(iter(first.errors))
    wider = replace(spec, source=replace(spec.source, allow=(str(tmp_path / "pictures"),)))
    again = run(wider, retry_failed=True)
    assert (again.state, again.ok) == ("complete", 3)
    assert data(spec.output)["width"].to_pylist() == [8, 9, 10]
    with pytest.raises(PlanMismatch, match="shard_rows"):
        run(replace(wider, shard_rows=2), retry_failed=True)


def test_a_store_that_goes_while_the_driver_works_ends_the_run_in_a_sentence(
    moody: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an OSError of the store's client, and the lock could not be released either."""
    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.001)
    real, away = Folder.write, [True]

    def write(self: Folder, name: str, data: bytes) -> None:
        if away[0] and ("README" in name or "progress" in name or "locks" in name):
            raise ConnectionRefusedError(111, "Connection refused")
        real(self, name, data)

    monkeypatch.setattr(Folder, "write", write)
    first, _ = start(moody)
    assert first.state == "failed"
    assert "is away: ConnectionRefusedError" in str(first.reason)
    assert "the same command goes on" in str(first.reason)
    away[0] = False
    monkeypatch.setattr("pipeline.output.lock._alive", lambda content: False)
    again, seen = start(moody)
    assert (again.state, again.resumed, seen) == ("complete", 4, [])


def test_an_id_that_is_no_text_is_told_and_does_not_keep_its_shard_from_being_retried(moody: RunSpec) -> None:
    """Before: the retry said that the input had changed, since the id that was written is an escape of the one read."""
    rows = [{"own": f"id {i}", "text": line} for i, line in enumerate(LINES)]
    rows[3]["own"], rows[7]["own"] = "half \ud83d", "half \ud83e"
    file = Path(moody.output).with_name("in.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = replace(moody, source=Source((str(file),), columns={"text": "text"}, id="own"))
    start(spec, ["line 4", "line 8"])
    result, seen = start(spec, [], retry_failed=True)
    assert result.state == "complete"
    assert (result.ok, result.failed) == (len(LINES) - 2, 2)
    assert seen == ["id 4", "id 8"]
    found = data(spec.output).to_pylist()
    assert [row["id"] for row in found if row["status"] == "failed"] == ["half \\ud83d", "half \\ud83e"]
    assert all("half of a surrogate pair" in row["error"] for row in found if row["status"] == "failed")
    assert verify(spec.output).ok
