"""On a store files get their final names while the run goes on: no copy at its end, whoever dies or comes late."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.files import resolve
from pipeline.input.source import Source, SourceError
from pipeline.output import commit
from pipeline.output.commit import ATTEMPTS, RECORDS, Superseded, Taken
from pipeline.output.dataset import SET_ASIDE, Output, Tally
from pipeline.output.planfile import PLAN, OutputError, read_shards
from pipeline.output.publish import loading, set_aside
from pipeline.output.verify import verify
from pipeline.run import driver
from pipeline.run.committed import Committed
from pipeline.run.draft import RunSpec
from pipeline.run.driver import Resources, RunResult, run
from pipeline.run.tasks import Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder, checksum
from tests.pipeline.run.test_retry import Crash, crashing
from tests.simulation.store import Bucket, _Writing
from tests.simulation.world import World
from tests.support.faulty import data, run_plain, spec_for
from tests.support.in_process import without_ray

LINES = [f"line {i}" for i in range(20)]
OUT = "sim://out"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """Four shards, into a store in memory; all in this process."""
    without_ray(monkeypatch)
    options = {"bucket": Bucket(World(0))}
    return replace(spec_for(tmp_path, LINES, shard_rows=5), output=OUT, storage_options=options)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is copied from now on."""
    found = list[str]()
    real = Folder.copy

    def copy(folder: Folder, name: str, target: str) -> None:
        found.append(target)
        real(folder, name, target)

    monkeypatch.setattr(Folder, "copy", copy)
    return found


def _run(spec: RunSpec) -> Output:
    result: RunResult = run(spec)
    assert (result.state, result.ok) == ("complete", 20), result.reason
    output = Output.open(spec.output, spec.storage_options)
    report = verify(spec.output, spec.storage_options)
    assert report.ok, report.problems
    return output


def _planned(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[Output, Worker, list[Task]]:
    """A run that has ended as it was about to begin; a worker of it, and what it would be given."""
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_compute", _stopped)
        with pytest.raises(OSError, match="stopped here"):
            run(spec)
    output = Output.open(spec.output, spec.storage_options)
    job = replace(driver._worker_job(spec, output, Resources()), epoch=1)
    return output, Worker(job), list(Committed(Tally()).tasks(output))


def _stopped(*args: Any) -> None:
    raise OSError("stopped here")


def _copied(spec: RunSpec, tmp_path: Path) -> str:
    """The folder, fetched to a disk."""
    for name, content in spec.storage_options["bucket"].objects.items():
        path = tmp_path / "copy" / name.removeprefix("out/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(tmp_path / "copy")


def _plain(spec: RunSpec, tmp_path: Path) -> pa.Table:
    """The rows as an undisturbed run on a disk makes them."""
    return data(run_plain(replace(spec, output=str(tmp_path / "plain"), storage_options={})).path)


def _same_rows(output: Output, spec: RunSpec, tmp_path: Path) -> bool:
    return pa.concat_tables(output.tables()).combine_chunks().equals(_plain(spec, tmp_path))


def test_no_file_is_copied(spec: RunSpec, tmp_path: Path, copies: list[str]) -> None:
    output = _run(spec)
    probe = [name for name in copies if name.endswith(".probe.copy")]
    assert copies == probe
    names = [f"part-0000{shard}-of-00004-{output.run}.parquet" for shard in range(4)]
    assert list(output.folder.listing("data")) == names
    assert [record.file for record in output.records()] == names
    assert not output.folder.listing(ATTEMPTS)
    assert _same_rows(output, spec, tmp_path)
    for shard, name in enumerate(names):
        assert output.shard_named(name) == shard
    others = ("part-00000-of-00004.parquet", f"part-00004-of-00005-{output.run}.parquet", f"{names[0]}.x")
    assert [output.shard_named(name) for name in others] == [None] * 3


def test_readers_go_by_the_run(spec: RunSpec, tmp_path: Path) -> None:
    """A file of another run that comes late is not read, `verify` tells of it, and it goes aside at the next start."""
    output = _run(spec)
    pattern = f"data/part-*-{output.run}.parquet"
    assert output.parts == pattern
    text = output.folder.read("README.md").decode()
    assert f"path: {pattern}" in text
    assert f'data_files="{OUT}/{pattern}"' in text
    copy = _copied(spec, tmp_path)
    assert resolve(Source((copy,))).path == (f"{copy}/{pattern}",)
    late = "part-00000-of-00003-0123456789ab.parquet"
    output.folder.write(f"data/{late}", b"late")
    assert not fnmatchcase(f"data/{late}", pattern)
    assert verify(OUT, spec.storage_options).problems == (
        f"data/{late} is not this run's; move it away, or run the job again to set it aside",
    )
    assert set_aside(output, output.folder.listing("data")) == [late]
    assert output.folder.read(f"{SET_ASIDE}/{late}") == b"late"
    assert verify(OUT, spec.storage_options).ok


def test_a_folder_named_with_a_slash_is_loaded_without_a_second_one(spec: RunSpec) -> None:
    """To a store `out//data` is another place than `out/data`."""
    output = Output(replace(_run(spec).folder, url=f"{OUT}/"), Output.open(OUT, spec.storage_options).plan)
    assert loading(output) == f'load_dataset("parquet", data_files="{OUT}/{output.parts}", split="train")'


def test_a_file_that_nobody_committed_is_replaced(
    spec: RunSpec, tmp_path: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker died between file and record: the shard is done again, and a copy takes the place of the other."""
    output, worker, tasks = _planned(spec, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_record", _stopped)
        with pytest.raises(OSError, match="stopped here"):
            worker.process(tasks[1])
    assert list(output.folder.listing("data")) == [output.part(1).removeprefix("data/")]
    copies.clear()
    output = _run(spec)
    assert [name for name in copies if "probe" not in name] == [output.part(1)]
    assert not output.folder.listing(SET_ASIDE)
    assert _same_rows(output, spec, tmp_path)
    for record in output.records():
        assert checksum(io.BytesIO(output.folder.read(output.part(record.shard)))) == record.checksum


def test_who_comes_second_has_the_record_of_the_first(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    _, worker, tasks = _planned(spec, monkeypatch)
    first = worker.process(tasks[0])
    assert worker.process(tasks[0]) == first
    assert worker.process(replace(tasks[0], tried=True)) == first, "an attempt that loses as on a disk"


def test_a_taken_name_without_a_record_is_no_end(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers have a shard; the first is slow with its record. The second is refused, and does it as an attempt: of
    the two records the first that comes counts."""
    output, worker, tasks = _planned(spec, monkeypatch)
    output.folder.write(output.part(0), b"slow")
    with pytest.raises(Taken, match=f"{output.run}.parquet is an attempt's that may never be committed") as refused:
        worker.process(tasks[0])
    assert refused.value.fault == "transient"
    record = worker.process(replace(tasks[0], tried=True))
    assert output.locate(record) == f"{ATTEMPTS}/{record.file}"  # type: ignore[union-attr,arg-type]
    assert output.folder.read(output.part(0)) == b"slow"


def test_a_shard_that_was_tried_in_vain_gets_its_name_at_once(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    output, worker, tasks = _planned(spec, monkeypatch)
    record = worker.process(replace(tasks[2], tried=True))
    assert f"data/{record.file}" == output.part(2)


@pytest.mark.parametrize("change", ["planned anew", "deleted", "another driver"])
def test_no_file_is_named_in_a_folder_that_is_another_s(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    output, worker, tasks = _planned(spec, monkeypatch)
    if change == "planned anew":
        output.folder.write(PLAN, output.folder.read(PLAN).replace(output.run.encode(), b"0123456789ab"))
    elif change == "deleted":
        output.folder.remove(PLAN)
    else:
        output.folder.write("_latentmill/locks/000002.json", b"{}")
    with pytest.raises(Superseded):
        worker.process(tasks[0])
    assert not output.folder.listing("data")
    assert not output.folder.listing(RECORDS)


def test_no_two_attempts_end_with_the_same_bytes(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its end a worker knows its own file, where the answer that it was made got lost."""
    output, worker, tasks = _planned(spec, monkeypatch)
    worker.process(tasks[0])
    first = output.folder.read(output.part(0))
    output.folder.remove(output.part(0))
    output.folder.remove(f"{RECORDS}/{output.run}-000000.json")
    worker.process(tasks[0])
    second = output.folder.read(output.part(0))
    tables = [pq.read_table(pa.BufferReader(content)) for content in (first, second)]
    assert tables[0].equals(tables[1])
    assert first[-4096:] != second[-4096:]


@pytest.mark.parametrize("how", ["writes over it", "refuses to be asked"])
def test_a_store_that_cannot_refuse_gets_copies_at_the_end(
    spec: RunSpec, tmp_path: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    close = _Writing.close

    def ended(self: _Writing) -> None:
        if self._once and how == "refuses to be asked":
            raise OSError("501 a header you provided implies functionality that is not implemented")
        self._once = False
        close(self)

    monkeypatch.setattr(_Writing, "close", ended)
    output = _run(spec)
    names = [f"data/part-0000{shard}-of-00004.parquet" for shard in range(4)]
    assert [name for name in copies if "probe" not in name] == names
    assert "named_at_commit" not in output.plan
    assert output.parts == "data/part-*.parquet"
    assert _same_rows(output, spec, tmp_path)


@pytest.mark.parametrize("run", ["../../elsewhere/", "*", "", None])
def test_a_stranger_s_plan_names_no_files_elsewhere(spec: RunSpec, tmp_path: Path, run: str | None) -> None:
    _run(spec)
    copy = _copied(spec, tmp_path)
    plan = Path(copy) / PLAN
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "run": run}))
    with pytest.raises(SourceError, match=r"plan\.json is damaged"):
        resolve(Source((copy,)))
    with pytest.raises(OutputError, match=r"plan\.json is damaged"):
        Output.open(copy)


@pytest.mark.fault
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_operation_loses_and_doubles_nothing(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr("pipeline.output.lock._alive", lambda content: False)
    expected = _plain(spec, tmp_path)
    operations = list[str]()
    for at in range(200):
        fresh = replace(spec, storage_options={"bucket": Bucket(World(0))})
        with pytest.MonkeyPatch.context() as patch:
            done = crashing(patch, at, after)
            try:
                run(fresh)
            except Crash:
                operations.append(done[-1])
            else:
                break
        output = _run(fresh)
        assert pa.concat_tables(output.tables()).combine_chunks().equals(expected), done[-1]
        assert list(output.folder.listing("data")) == [output.part(shard).removeprefix("data/") for shard in range(4)]
    assert 40 < len(operations) < 200
    assert len({name for name in operations if name.startswith("copy data/")}) == 0


def test_a_copy_of_the_folder_is_finished_on_a_disk(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are the store's; files get them as on any disk."""
    output, worker, tasks = _planned(spec, monkeypatch)
    worker.process(tasks[0])
    here = replace(spec, output=_copied(spec, tmp_path), storage_options={})
    finished = _run(here)
    assert list(finished.folder.listing("data")) == [output.part(shard).removeprefix("data/") for shard in range(4)]
    named = [f"data/{record.file}" == finished.part(record.shard) for record in finished.records()]
    assert named == [True, False, False, False]
    assert _same_rows(finished, spec, tmp_path)


def test_on_a_disk_names_are_given_at_the_end(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename costs nothing, and nobody reads half a dataset."""
    spec = replace(spec, output=str(tmp_path / "disk"), storage_options={})
    output, worker, tasks = _planned(spec, monkeypatch)
    assert [task.part for task in tasks] == [None] * 4
    worker.process(tasks[0])
    assert not output.folder.listing("data")
    assert [shard.index for shard in read_shards(output.own)] == [0, 1, 2, 3]
    assert list(_run(spec).folder.listing("data")) == [f"part-0000{shard}-of-00004.parquet" for shard in range(4)]
