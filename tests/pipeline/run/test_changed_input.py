"""The input changes while a run goes on: no row of the changed file is committed, and nothing is published."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.input import pins
from pipeline.input.source import Source, SourceError
from pipeline.output.commit import RECORDS
from pipeline.output.dataset import Output
from pipeline.output.planfile import read_shards
from pipeline.output.publish import publish
from pipeline.output.verify import verify
from pipeline.run import driver
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import Resources, _worker_job, run
from pipeline.run.plan import write_plan
from pipeline.run.tasks import Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder
from tests.support.faulty import commit_plain, spec_for

LINES = [f"line {i}" for i in range(8)]


def planned(spec: RunSpec) -> tuple[Worker, list[Task]]:
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
    output = Output.open(spec.output)
    tasks = [Task.of(shard) for shard in read_shards(output.own)]
    return Worker(_worker_job(spec, output, Resources())), tasks


def records(spec: RunSpec) -> int:
    return len(list((Path(spec.output) / RECORDS).glob("*")))


def test_a_line_that_is_inserted_before_the_second_shard(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    worker, tasks = planned(spec)
    worker.process(tasks[0])
    path = Path(spec.source.path[0])
    path.write_text("new\n" + path.read_text())
    with pytest.raises(SourceError, match=r"in\.txt: the input changed .*: 8 rows in 56 bytes were planned"):
        worker.process(tasks[1])
    path.unlink()
    with pytest.raises(SourceError, match=r"in\.txt: is gone"):
        worker.process(tasks[1])
    assert records(spec) == 1


def test_the_same_content_with_another_time_goes_on_and_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=2)
    worker, tasks = planned(spec)
    os.utime(spec.source.path[0], (1, 1))
    scans: list[str] = []
    real = pins.scanned_again

    def counted(source: Source, *rest: Any) -> Any:
        scans.append(source.path[0])
        return real(source, *rest)

    monkeypatch.setattr(pins, "scanned_again", counted)
    for task in tasks:
        worker.process(task)
    assert (records(spec), len(scans)) == (4, 1)


def _jsonl(folder: Path, change: bool) -> None:
    rows = [{"text": line, "key": "zzz" if change and i == 6 else f"k{i}"} for i, line in enumerate(LINES)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(folder: Path, change: bool) -> None:
    pq.write_table(pa.table({"text": [*LINES[:6], "other" if change else "", "x"]}), folder / "in.parquet")


def _images(folder: Path, change: bool) -> None:
    for i in range(8):
        if not change or i == 6:
            Image.new("RGB", (8, 8), (i, 99 * change, 0)).save(folder / f"{i}.png")


@pytest.mark.parametrize("write", [_jsonl, _parquet, _images])
def test_every_format(tmp_path: Path, write: Callable[[Path, bool], None]) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", False)
    id = "key" if write is _jsonl else None
    columns = {"text": "path" if write is _images else "text"}
    source = Source((str(tmp_path / "in"),), columns=columns, id=id)
    spec = replace(spec_for(tmp_path, [], shard_rows=4), source=source)
    worker, tasks = planned(spec)
    worker.process(tasks[0])
    write(tmp_path / "in", True)
    with pytest.raises(SourceError, match="the input changed during the run"):
        worker.process(tasks[1])
    assert records(spec) == 1


def test_on_a_store(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/changed-input/in.txt", "".join(f"{line}\n" for line in LINES).encode())
    source = Source(("memory://changed-input/in.txt",), columns={"text": "text"})
    worker, tasks = planned(replace(spec_for(tmp_path, [], shard_rows=4), source=source))
    worker.process(tasks[0])
    fs.pipe_file("/changed-input/in.txt", "".join(f"{line}\n" for line in LINES[::-1]).encode())
    with pytest.raises(SourceError, match="other content of that size"):
        worker.process(tasks[1])


def test_verify_goes_by_the_plan_though_the_input_says_the_same_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that is renamed during the run: a planned row is missing, and one is there that was not planned."""
    (tmp_path / "in").mkdir()
    _jsonl(tmp_path / "in", False)
    source = Source((str(tmp_path / "in"),), columns={"text": "text"}, id="key")
    spec = replace(spec_for(tmp_path, [], shard_rows=4), source=source)
    real = driver._worker_job

    def changed(*arguments: Any) -> Any:
        _jsonl(tmp_path / "in", True)
        return real(*arguments)

    monkeypatch.setattr(pins.Pins, "check", lambda self, span: None)
    monkeypatch.setattr("tests.support.faulty._worker_job", changed)
    output, tally = commit_plain(spec)
    publish(output, tally, "test", "")
    report = verify(spec.output)
    assert not report.ok
    assert len(report.problems) == 1
    assert "not the planned ones" in report.problems[0]


@pytest.mark.parametrize("same", [True, False])
def test_a_change_behind_the_workers_backs_is_seen_before_publication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=4)

    def compute(spec: RunSpec, output: Output, *rest: Any) -> None:
        worker = Worker(_worker_job(spec, output, Resources()))
        for shard in read_shards(output.own):
            worker.process(Task.of(shard))
        path = Path(spec.source.path[0])
        path.write_text(path.read_text() + "" if same else "more\n")

    monkeypatch.setattr(driver, "_compute", compute)
    finished: list[int] = []
    result = run(spec, finish=lambda given: finished.append(1))
    assert (result.state, len(finished)) == (("complete", 1) if same else ("failed", 0))
    assert (tmp_path / "out/_SUCCESS").exists() == same
    if not same:
        assert "the input changed during the run" in str(result.reason)
        assert "in.txt" in str(result.reason)
