"""What ``finish`` makes, and what stages leave for it: checked by `verify`, done again when lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline import access
from pipeline.output.commit import SUMMARIES
from pipeline.output.dataset import Output
from pipeline.output.lock import lock_name
from pipeline.output.products import PRODUCTS, problems, take_stock
from pipeline.output.publish import publish
from pipeline.output.verify import verify
from pipeline.run import driver
from pipeline.run.draft import RunSpec
from pipeline.run.driver import Finished, Resources, RunError, _worker_job, run
from pipeline.run.worker import Worker
from pipeline.storage import Folder
from tests.support.faulty import commit_plain, data, spec_for

LINES = [f"line {i}" for i in range(8)]
Start = Callable[[], tuple[list[str], Any]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts the same run of two shards in this process: what it said, and its result. Its product: two files."""
    spec = spec_for(tmp_path, LINES, shard_rows=4)

    def compute(
        spec: RunSpec, output: Output, lock: Any, reporter: Any, resources: Any, most: Any, address: Any, found: Any,
    ) -> None:  # fmt: skip
        worker = Worker(_worker_job(spec, output, Resources()))
        for task in found.tasks(output):
            worker.process(task)

    def finish(finished: Finished) -> None:
        total = sum(int(summary["count"][0]) for summary in finished.summaries())
        for name in ("index/vectors.bin", "total.txt"):
            with finished.output.open_file(name, "wb") as file:
                file.write(str(total).encode() * 100)

    def started() -> tuple[list[str], Any]:
        said: list[str] = []
        result = run(
            spec, finish=finish, products=("index", "total.txt"), progress=lambda p: said.append(p.message or "")
        )
        return [message for message in said if message], result

    monkeypatch.setattr(driver, "_compute", compute)
    return started


def _gone(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [_gone, _cut])
@pytest.mark.parametrize("name", ["index/vectors.bin", "total.txt"])
def test_a_lost_product_is_told_and_made_again(
    tmp_path: Path, start: Start, harm: Callable[[Path], None], name: str
) -> None:
    assert start()[1].state == "complete"
    out = tmp_path / "out"
    assert verify(str(out)).ok
    content = (out / name).read_bytes()
    harm(out / name)
    report = verify(str(out))
    assert not report.ok
    assert len(report.problems) == 1
    assert report.problems[0].startswith(name)
    said, result = start()
    assert (result.state, result.resumed) == ("complete", 2)
    assert [message for message in said if name in message and "made again" in message]
    assert (out / name).read_bytes() == content
    assert verify(str(out)).ok
    assert start()[0] == []


def test_a_product_whose_bytes_changed_is_found_by_its_checksum(tmp_path: Path, start: Start) -> None:
    start()
    path = tmp_path / "out/index/vectors.bin"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert "its checksum differs" in verify(str(tmp_path / "out")).problems[0]
    assert verify(str(tmp_path / "out"), checksums=False).ok


@pytest.mark.parametrize("harm", [_gone, _cut, lambda path: path.write_bytes(b"")])
def test_a_shard_whose_summary_is_lost_is_done_again(
    tmp_path: Path, start: Start, harm: Callable[[Path], None]
) -> None:
    start()
    out = tmp_path / "out"
    expected = data(str(out))
    summaries = sorted((out / SUMMARIES).iterdir())
    assert len(summaries) == 2
    harm(summaries[1])
    report = verify(str(out))
    assert len(report.problems) == 1
    assert "the summary of shard 1" in report.problems[0]
    said, result = start()
    assert (result.state, result.resumed) == ("complete", 1)
    assert len([message for message in said if "the summary of shard 1" in message]) == 1
    assert [int(summary["count"][0]) for summary in Output.open(str(out)).summaries()] == [4, 4]
    assert verify(str(out)).ok
    assert data(str(out)).equals(expected)


def test_a_summary_without_a_recorded_size_counts_as_whole_unless_it_is_gone_or_empty(tmp_path: Path) -> None:
    """As records of older code have none."""
    output, _ = commit_plain(spec_for(tmp_path, LINES, shard_rows=8))
    record = next(output.records())
    assert record.summary_bytes == ((tmp_path / "out" / SUMMARIES / record.summary[0]).stat().st_size,)
    old = type(record)(**{**vars(record), "summary_bytes": ()})
    for size, lost in ((7, False), (0, True)):
        assert bool(output.lost_summary(old, {SUMMARIES: {record.summary[0]: size}})) == lost
    assert output.lost_summary(old, {SUMMARIES: {}})


def test_an_output_without_a_list_of_products_is_whole_without_them(tmp_path: Path, start: Start) -> None:
    start()
    (tmp_path / "out" / PRODUCTS).unlink()
    assert verify(str(tmp_path / "out")).ok
    assert start()[1].state == "complete"
    (tmp_path / "out" / PRODUCTS).write_text("{")
    assert "is damaged" in verify(str(tmp_path / "out")).problems[0]
    assert start()[1].state == "complete"
    assert verify(str(tmp_path / "out")).ok


def test_products_on_a_store_are_known_by_its_versions(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    plain, tally = commit_plain(spec_for(tmp_path, LINES, shard_rows=8))
    publish(plain, tally, "test", "")
    output = Output(Folder.at("memory://products-test"), plain.plan)
    fs.pipe_file("/products-test/index/a.bin", bytes(np.arange(9)))
    take_stock(output, ("index", "nothing"))
    assert problems(output, checksums=True) == []
    fs.pipe_file("/products-test/index/a.bin", bytes(np.arange(9)))
    assert "another version" in problems(output, checksums=False)[0]
    fs.rm_file("/products-test/index/a.bin")
    assert problems(output, checksums=False) == ["index/a.bin is gone"]


def _twice(number: int) -> int:
    return 2 * number


def _counted_apart(finished: Finished) -> None:
    """Tells in which process it ran, and on what terms."""
    total = sum(int(summary["count"][0]) for summary in finished.summaries())
    options = [grant.options for grant in access.held()]
    doubled = None if finished.spread is None else list(finished.spread(_twice, range(3)))
    with finished.output.open_file("total.json", "wb") as file:
        file.write(
            json.dumps({"total": total, "process": os.getpid(), "options": options, "doubled": doubled}).encode()
        )


def test_on_a_cluster_finish_runs_there(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=4)
    with access.granted("s3://bucket", {"key": "k"}):
        ended = run(spec, finish=_counted_apart, finish_apart=True, products=("total.json",), address=local_ray)
    told = json.loads((tmp_path / "out/total.json").read_text())
    assert ended.state == "complete"
    assert (told["total"], told["options"]) == (len(LINES), [{"key": "k"}])
    assert told["process"] != os.getpid()
    assert told["doubled"] == [0, 2, 4]  # by tasks of its own


def test_where_ray_is_ours_finish_runs_here(tmp_path: Path, local_ray: str) -> None:
    run(spec_for(tmp_path, LINES), finish=_counted_apart, finish_apart=True, products=("total.json",))
    told = json.loads((tmp_path / "out/total.json").read_text())
    assert (told["process"], told["doubled"]) == (os.getpid(), None)


def _refused(finished: Finished) -> None:
    raise ValueError("no picture was drawn")


def test_what_finish_refuses_elsewhere_is_told(tmp_path: Path, local_ray: str) -> None:
    with pytest.raises(ValueError, match=r"^no picture was drawn$"):
        run(spec_for(tmp_path, LINES), finish=_refused, finish_apart=True, address=local_ray)


def _taken_over(finished: Finished) -> None:
    finished.output.folder.create(lock_name(finished.output.epoch + 1), b"{}")
    finished.output.open_file("late.txt", "wb")


def test_finish_elsewhere_stops_when_another_driver_has_the_folder(tmp_path: Path, local_ray: str) -> None:
    with pytest.raises(RunError, match="another run has taken"):
        run(spec_for(tmp_path, LINES), finish=_taken_over, finish_apart=True, address=local_ray)
    assert not (tmp_path / "out/late.txt").exists()
