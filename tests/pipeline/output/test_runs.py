"""A plan is a run: what workers of an earlier plan leave in the same folder counts for nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.contract import StageSpec
from pipeline.output import commit
from pipeline.output.commit import ATTEMPTS, RECORDS, Superseded
from pipeline.output.dataset import Output, Tally
from pipeline.output.planfile import PLAN, OutputError, read_shards
from pipeline.output.publish import publish
from pipeline.output.verify import verify
from pipeline.run.committed import committed
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import Resources, _worker_job
from pipeline.run.plan import write_plan
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder
from tests.support.faulty import commit_plain, data, spec_for

LINES = [f"line {i}" for i in range(8)]


def of_factor(folder: Path, factor: float) -> RunSpec:
    """A run whose values are the lengths of its lines, times a factor; two shards."""
    stage = StageSpec("tests.support.toy_job:Letters", {"mode": "upper", "factor": factor})
    return replace(spec_for(folder, LINES, shard_rows=4), stage=stage)


def planned(spec: RunSpec) -> tuple[Output, Worker, list[Task]]:
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
    output = Output.open(spec.output)
    tasks = [Task.of(shard) for shard in read_shards(output.own)]
    return output, Worker(_worker_job(spec, output, Resources())), tasks


def lengths(output: Output) -> list[float]:
    values: list[float] = pa.concat_tables(output.tables(["length"]))["length"].to_pylist()
    return values


def survey(output: Output) -> frozenset[int]:
    return committed(output, Reporter(None, None, 1)).done


def test_a_late_worker_of_an_earlier_plan_commits_nothing(tmp_path: Path) -> None:
    _, late, tasks = planned(of_factor(tmp_path, 1))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Superseded, match="holds no plan any more"):
        late.process(tasks[0])
    shutil.rmtree(tmp_path / "out")
    output, worker, tasks = planned(of_factor(tmp_path, 10))
    with pytest.raises(Superseded, match=str(output.run)):
        late.process(tasks[0])
    for task in tasks:
        worker.process(task)
    assert lengths(output) == [10.0 * len(line) for line in LINES]


def test_a_record_of_another_run_is_not_counted_though_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan may change between a late worker's look at it and its record."""
    first, late, _ = planned(of_factor(tmp_path, 1))
    (tmp_path / "out" / PLAN).unlink()
    output, worker, tasks = planned(of_factor(tmp_path, 10))
    with monkeypatch.context() as patch:
        patch.setattr(commit, "planned_run", lambda folder: first.run)
        late.process(tasks[0])
        late.process(tasks[1])
    assert len(list((tmp_path / "out" / RECORDS).iterdir())) == 2
    assert list(output.records()) == []
    worker.process(tasks[0])
    assert not verify(output.path).ok
    assert survey(output) == {0}
    assert [path.name for path in (tmp_path / "out" / RECORDS).iterdir()] == [f"{output.run}-000000.json"]
    assert [path.name.partition("-")[0] for path in (tmp_path / "out" / ATTEMPTS).iterdir()] == [output.run]
    worker.process(tasks[1])
    assert lengths(output) == [10.0 * len(line) for line in LINES]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_is_planned_anew_takes_no_row_of_the_old_plan(tmp_path: Path, named: bool) -> None:
    """Deleting ``plan.json`` does not make the old values the new run's; nor those of a plan without an id."""
    spec = of_factor(tmp_path, 1)
    if named:
        commit_plain(spec)
    else:
        output, worker, tasks = planned(spec)
        plan = {key: value for key, value in output.plan.items() if key != "run"}
        (tmp_path / "out" / PLAN).write_text(json.dumps(plan))
        worker.job = replace(worker.job, run="")
        for task in tasks:
            worker.process(task)
        assert {path.name for path in (tmp_path / "out" / RECORDS).iterdir()} == {"000000.json", "000001.json"}
    assert survey(Output.open(spec.output)) == {0, 1}
    (tmp_path / "out" / PLAN).unlink()
    output, worker, tasks = planned(of_factor(tmp_path, 10))
    assert survey(output) == set()
    tally = commit_tally(worker, tasks)
    publish(output, tally, "test", "")
    assert lengths(output) == [10.0 * len(line) for line in LINES]
    assert verify(spec.output).ok


def commit_tally(worker: Worker, tasks: list[Task]) -> Tally:
    tally = Tally()
    for task in tasks:
        record = worker.process(task)
        assert isinstance(record, commit.Record)
        tally.add(record)
    return tally


def test_an_earlier_runs_published_file_of_the_same_size_is_not_taken(tmp_path: Path) -> None:
    output, worker, tasks = planned(of_factor(tmp_path, 10))
    tally = commit_tally(worker, tasks)
    (tmp_path / "out/data").mkdir()
    for record in output.records():
        (tmp_path / "out" / output.part(record.shard)).write_bytes(bytes(record.size))
    assert lengths(output) == [10.0 * len(line) for line in LINES]
    publish(output, tally, "test", "")
    assert data(output.path)["length"].to_pylist() == [10.0 * len(line) for line in LINES]


def test_a_record_under_another_shards_name_is_none(tmp_path: Path) -> None:
    output, _ = commit_plain(of_factor(tmp_path, 1))
    records = sorted((tmp_path / "out" / RECORDS).iterdir())
    shutil.copy(records[0], records[1])
    with pytest.raises(OutputError, match="is no commit record"):
        list(output.records())


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b'{"shard": 1}', b"\xff"])
def test_a_record_that_is_none_is_listed_and_its_shard_done_again(tmp_path: Path, content: bytes) -> None:
    """It took a hand that deletes it: every command refused, `verify` too."""
    spec = of_factor(tmp_path, 1)
    output, tally = commit_plain(spec)
    publish(output, tally, "test", "")
    record = tmp_path / "out" / commit.record_name(1, output.run)
    record.write_bytes(content)
    report = verify(spec.output)
    assert len(report.problems) == 1
    assert record.name in report.problems[0]
    assert report.problems[0].endswith("run the job again")
    assert (report.found, output.status().progress.shards_done) == (4, 1)
    said: list[str] = []
    reporter = Reporter(None, lambda progress: said.append(progress.message or ""), 1)
    assert committed(output, reporter).done == {0}
    assert [message for message in said if message] == [
        f"{RECORDS}/{record.name} is no commit record; the shard is done again"
    ]
    assert not record.exists()


def test_a_table_that_is_damaged_at_its_size_is_named(tmp_path: Path) -> None:
    """Found by the simulation: somebody damages a file between the survey and what is made of all tables."""
    output, worker, tasks = planned(of_factor(tmp_path, 1))
    for task in tasks:
        worker.process(task)
    file = next((tmp_path / "out" / ATTEMPTS).iterdir())
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(OutputError, match=f"{file.name} is damaged .* delete it and run the job again"):
        lengths(output)


def test_publishing_on_a_store_deletes_no_file_of_a_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the simulation: who stood still between copy and deletion deleted what another had published since."""
    output, worker, tasks = planned(of_factor(tmp_path, 1))
    for task in tasks:
        worker.process(task)
    for folder in ("data", "_latentmill/set-aside"):  # which a store needs no word for
        (tmp_path / "out" / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / output.part(0)).write_bytes(b"a stray")
    removed: list[str] = []
    plain = Folder.remove
    output = replace(output, folder=replace(output.folder, local=False))
    monkeypatch.setattr(Folder, "remove", lambda self, name: (removed.append(name), plain(self, name)))
    publish(output, Tally(), "title", "")
    assert not [name for name in removed if name.startswith("data/")]
    assert (tmp_path / "out/_latentmill/set-aside" / Path(output.part(0)).name).read_bytes() == b"a stray"
    assert lengths(output) == [float(len(line)) for line in LINES]
