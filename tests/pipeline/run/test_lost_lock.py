"""A driver that was paused while another took its folder wakes at any step: it stops, and destroys nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.output.commit import ATTEMPTS, RECORDS, Superseded
from pipeline.output.dataset import PROGRESS, SUCCESS, Output, Tally
from pipeline.output.leftovers import Leftovers
from pipeline.output.lock import Lock, LockLost, lock_name
from pipeline.output.log import LOG
from pipeline.output.planfile import read_files, read_shards
from pipeline.output.publish import CARD, publish, set_aside
from pipeline.output.verify import verify
from pipeline.run import driver
from pipeline.run.committed import committed
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import Resources, RunError, _worker_job, run
from pipeline.run.plan import write_plan
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder
from tests.support.faulty import data, run_plain, spec_for

LINES = [f"line {i}" for i in range(8)]


def take(output: str, epoch: int) -> None:
    """Another machine takes the folder, after a lease that this driver slept through."""
    content = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 1, "process": "1", "token": "t", "renewed": 0}
    Folder.at(output).write(lock_name(epoch), json.dumps(content).encode())


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[RunSpec, Output]]:
    """A planned run of two shards, and its driver's lock."""
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    lock = Lock(Folder.at(spec.output))
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
    yield spec, replace(Output.open(spec.output), lock=lock)
    lock.release()


def commit(spec: RunSpec, output: Output) -> Tally:
    """All shards, by a worker of this driver."""
    worker, tally = Worker(_worker_job(spec, output, Resources())), Tally()
    for shard in read_shards(output.own):
        tally.add(worker.process(Task.of(shard)))  # type: ignore[arg-type]
    return tally


def files(output: Output) -> dict[str, bytes]:
    root = Path(output.path)
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if "locks/" not in name}


def test_attempts_of_a_later_driver_are_not_swept(
    held: tuple[RunSpec, Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it wakes right after it has asked: what bears a later epoch is not its to remove."""
    spec, old = held
    take(old.path, 2)
    later = Lock.__new__(Lock)
    later.epoch = 2
    monkeypatch.setattr(Lock, "check", lambda lock: None)
    commit(spec, replace(old, lock=later))
    assert all("-e2-" in path.name for path in (Path(old.path) / ATTEMPTS).iterdir())
    before = files(old)
    blind = Leftovers(old, old.listings())  # listed before any record was there
    blind.remove()
    assert files(old) == before
    Leftovers(replace(old, lock=later), old.listings()).remove()
    assert not list((Path(old.path) / ATTEMPTS).iterdir())


def test_a_survey_after_the_lock_is_lost_removes_nothing(held: tuple[RunSpec, Output]) -> None:
    spec, output = held
    commit(spec, output)
    attempt = next((Path(output.path) / ATTEMPTS).iterdir())
    attempt.write_bytes(attempt.read_bytes()[:-1])  # its record would be withdrawn
    (Path(output.path) / "data").mkdir()
    (Path(output.path) / "data/stranger.parquet").touch()
    take(output.path, 2)
    before = files(output)
    with pytest.raises(LockLost):
        committed(output, Reporter(None, None, 1))
    with pytest.raises(LockLost):
        set_aside(output, output.folder.listing("data"))
    (Path(output.path) / "data/stranger.parquet").unlink()
    before.pop("data/stranger.parquet")
    with pytest.raises(LockLost):
        committed(output, Reporter(None, None, 1))
    assert files(output) == before


def test_publishing_and_finishing_stop_when_the_lock_is_lost(held: tuple[RunSpec, Output]) -> None:
    spec, output = held
    tally = commit(spec, output)
    take(output.path, 2)
    before = files(output)
    with pytest.raises(LockLost):
        publish(output, tally, "test", "")
    with pytest.raises(LockLost):
        output.open_file("product.json", "wb")
    with pytest.raises(LockLost):
        output.save_progress(Reporter(None, None, 1)._last)
    assert files(output) == before


def test_success_is_not_written_once_the_lock_is_lost(
    held: tuple[RunSpec, Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: the last question came before the card."""
    spec, output = held
    tally, real = commit(spec, output), Folder.write

    def overtaken(folder: Folder, name: str, *rest: Any) -> None:
        real(folder, name, *rest)
        if name == CARD:
            take(output.path, 2)

    monkeypatch.setattr(Folder, "write", overtaken)
    with pytest.raises(LockLost):
        publish(output, tally, "test", "")
    assert not (Path(output.path) / SUCCESS).exists()


def test_success_that_came_late_into_the_folder_of_another_makes_no_run_complete(held: tuple[RunSpec, Output]) -> None:
    spec, output = held
    commit(spec, output)
    output.lock.release()  # type: ignore[union-attr]
    output.folder.write(SUCCESS, b"{}")
    output.folder.write(PROGRESS, json.dumps({"phase": "complete"}).encode())
    assert output.status().state == "complete"
    next((Path(output.path) / RECORDS).iterdir()).unlink()
    now = output.status()
    assert (now.state, now.progress.phase) == ("incomplete", "interrupted")


def test_workers_of_a_driver_that_was_replaced_commit_nothing(held: tuple[RunSpec, Output]) -> None:
    spec, output = held
    take(output.path, 2)
    with pytest.raises(Superseded, match="later driver"):
        commit(spec, output)
    assert not (Path(output.path) / RECORDS).exists()


@pytest.mark.parametrize("step", ["committed", "_compute", "publish"])
def test_a_run_whose_folder_is_taken_ends_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    expected = data(run_plain(replace(spec, output=str(tmp_path / "plain"))).path)
    finished: list[int] = []

    def compute(spec: RunSpec, output: Output, *rest: Any) -> None:
        commit(spec, output)

    monkeypatch.setattr(driver, "_compute", compute)
    with monkeypatch.context() as patch:
        real = getattr(driver, step)

        def paused(*arguments: Any) -> Any:
            if step != "_compute":
                take(spec.output, 2)
                return real(*arguments)
            real(*arguments)
            take(spec.output, 2)
            return None

        patch.setattr(driver, step, paused)
        result = run(spec, finish=lambda given: finished.append(1))
    assert result.state == "failed"
    assert "another run has taken this output folder" in str(result.reason)
    assert len(finished) == (step == "publish")
    assert not (tmp_path / "out/_SUCCESS").exists()
    (tmp_path / "out" / lock_name(2)).write_text("{}")
    assert run(spec).state == "complete"
    assert verify(spec.output).ok
    assert data(spec.output).equals(expected)


def test_success_is_deleted_only_where_it_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lost the folder, and stood still as it deleted what was not there, deleted what another had
    published since."""
    spec, gone, real = spec_for(tmp_path, LINES, shard_rows=4), list[str](), Folder.remove

    def remove(folder: Folder, name: str) -> None:
        gone.append(name)
        real(folder, name)

    monkeypatch.setattr(driver, "_compute", lambda spec, output, *rest: commit(spec, output))
    monkeypatch.setattr(Folder, "remove", remove)
    assert run(spec).state == "complete"
    assert SUCCESS not in gone
    next((tmp_path / "out/data").iterdir()).unlink()
    monkeypatch.setattr(driver, "publish", lambda *rest: None)
    run(spec)
    assert gone.count(SUCCESS) == 1
    assert not (tmp_path / "out" / SUCCESS).exists()


def test_a_plan_is_not_put_over_another_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    real = driver.write_plan

    def slow(spec: RunSpec, *rest: Any) -> Any:
        take(spec.output, 2)
        return real(spec, *rest)

    monkeypatch.setattr(driver, "write_plan", slow)
    with pytest.raises(RunError, match="another run has taken"):
        run(spec)
    assert not (tmp_path / "out/_latentmill/plan.json").exists()


def test_a_plan_of_another_run_stands_though_it_came_after_the_last_question(tmp_path: Path) -> None:
    """A driver that stands still between asking for its lock and writing its plan does not replace another's."""
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    plan = tmp_path / "out/_latentmill/plan.json"
    with pytest.raises(LockLost):
        write_plan(spec, draft(spec), Folder.at(str(plan.parent)), 0.0, lambda: plan.write_text("another run's"))
    assert plan.read_text() == "another run's"


def test_who_plans_is_overtaken_and_wakes_puts_no_tables_in_the_place_of_the_others(tmp_path: Path) -> None:
    """Before: the input was changed meanwhile, and the other's run went on by a plan of what it had been: complete,
    with rows missing."""
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    own = Folder.at(f"{spec.output}/_latentmill")

    def overtaken() -> None:
        (tmp_path / "in.txt").write_text("\n".join([*LINES, "more"]))
        write_plan(spec, draft(spec), own, 0.0)

    with pytest.raises(LockLost):
        write_plan(spec, draft(spec), own, 0.0, overtaken)
    output = Output.open(spec.output)
    assert output.plan["rows"] == sum(shard.rows for shard in read_shards(own)) == len(LINES) + 1
    assert [rows for *_, rows in read_files(own)] == [len(LINES) + 1]
    Leftovers(output, output.listings()).remove()
    assert sorted(name for name in own.listing("") if name.endswith(".parquet")) == [
        f"{output.run}-files.parquet", f"{output.run}-shards.parquet"
    ]  # fmt: skip


def test_what_a_late_worker_commits_in_a_lost_ones_place_is_published(tmp_path: Path) -> None:
    """It counts where the table of what counted was deleted from a complete output, and lies among the attempts."""
    spec = spec_for(tmp_path, [f"line {i}" for i in range(6)], shard_rows=6)
    expected = data(run_plain(spec).path)
    output = Output.open(spec.output)
    for folder in (RECORDS, LOG):
        for name in output.folder.listing(folder):
            output.folder.remove(f"{folder}/{name}")
    Worker(_worker_job(spec, output, Resources())).process(Task.of(next(read_shards(output.own))))
    part = Path(spec.output) / output.part(0)
    part.write_bytes(bytes(part.stat().st_size))  # of other rows, as where some had failed
    assert run(spec, resources=Resources()).state == "complete"
    assert data(spec.output).equals(expected)
    assert not output.folder.listing(ATTEMPTS)
    assert verify(spec.output).ok
