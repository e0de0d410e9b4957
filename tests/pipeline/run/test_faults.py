"""Whatever dies, fills up or is cut: afterwards every planned id is there exactly once, with the same data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.output.dataset import Output
from pipeline.output.lock import OutputLocked
from pipeline.output.progress import Progress
from pipeline.output.verify import verify
from pipeline.run.draft import RunSpec
from pipeline.run.driver import Resources, run
from pipeline.run.plan import PlanMismatch
from tests.support.faulty import STEPS, data, run_plain, spec_for

pytestmark = pytest.mark.fault
LINES = [f"line {i}" for i in range(40)]
TWO = Resources(max_workers=2, cpus=0.5)


def _undisturbed(spec: RunSpec, folder: Path) -> pa.Table:
    stage = replace(spec.stage, params={**spec.stage.params, "delay": 0.0})
    return data(run_plain(replace(spec, stage=stage, output=str(folder / "undisturbed"))).path)


def _whole(spec: RunSpec, expected: pa.Table) -> None:
    """What every fault has to end with."""
    report = verify(spec.output)
    assert report.ok, report.problems
    assert report.found == report.planned == expected.num_rows
    assert data(spec.output).equals(expected)
    assert not list(Path(spec.output).glob("_latentmill/attempts/*"))


def _child(spec: RunSpec, address: str, **request: Any) -> subprocess.Popen[str]:
    folder = Path(spec.output).parent
    content = {"orders": str(folder / "orders"), "input": spec.source.path[0], "output": spec.output,
               "address": address, "shard_rows": spec.shard_rows, "delay": spec.stage.params["delay"],
               **request}  # fmt: skip
    path = folder / "request.json"
    path.write_text(json.dumps(content))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.child_run", str(path)], stdout=subprocess.PIPE, text=True
    )


def _wait_for_a_record(spec: RunSpec) -> None:
    records = Path(spec.output) / "_latentmill/records"
    deadline = time.monotonic() + 120
    while not list(records.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


DRIVER_STEPS = [
    ("begin", "files.parquet", "after"),
    ("create", "plan.json", "before"),
    ("create", "plan.json", "after"),
    ("move", "part-00000", "before"),
    ("move", "part-00000", "after"),
    ("move", "part-00003", "after"),
    ("write", "README.md", "after"),
    ("write", "_SUCCESS", "before"),
    ("write", "_SUCCESS", "after"),
]
WORKER_STEPS = [("open", "after"), *((step, moment) for step in STEPS for moment in ("before", "after"))]


def test_driver_killed_at_every_step(tmp_path: Path, local_ray: str) -> None:
    """One output, killed again and again: each start resumes what the last one left, and dies a step later."""
    spec = spec_for(tmp_path, LINES)
    expected = _undisturbed(spec, tmp_path)
    killed = tmp_path / "orders/killed"
    steps: list[dict[str, Any]] = [{"driver": step} for step in DRIVER_STEPS[:3]]
    steps += [{"worker": step} for step in WORKER_STEPS]
    steps += [{"driver": step} for step in DRIVER_STEPS[3:]]
    for step in steps:
        killed.unlink(missing_ok=True)
        child = _child(spec, local_ray, **step)
        out, _ = child.communicate(timeout=250)
        assert child.returncode == -signal.SIGKILL, (step, out)
        assert killed.exists(), step
        (tmp_path / "orders/kill-at").unlink(missing_ok=True)
        shards = {record.shard for record in Output.open(spec.output).records()} if _planned(spec) else set()
        assert shards <= set(range(4))
    assert run(spec, resources=TWO).state == "complete"
    _whole(spec, expected)


def _planned(spec: RunSpec) -> bool:
    return (Path(spec.output) / "_latentmill/plan.json").exists()


def test_driver_killed_while_its_workers_go_on(tmp_path: Path, local_ray: str) -> None:
    """The next run starts at once, beside workers that do not know yet."""
    spec = spec_for(tmp_path, LINES, shard_rows=5, delay=0.1)
    expected = _undisturbed(spec, tmp_path)
    child = _child(spec, local_ray)
    _wait_for_a_record(spec)
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    result = run(spec, resources=TWO)
    assert result.state == "complete"
    assert result.resumed >= 1
    _whole(spec, expected)


def test_committed_file_vanishes_during_the_run(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=5, delay=0.1)  # else done before it reports progress
    expected = _undisturbed(spec, tmp_path)
    taken: list[str] = []
    messages: list[str] = []

    def take(progress: Progress) -> None:
        messages.append(progress.message or "")
        if progress.phase == "running" and not taken:
            for record in Output.open(spec.output).records():
                taken.append(record.file)
                (Path(spec.output) / "_latentmill/attempts" / record.file).unlink()

    assert run(spec, resources=Resources(cpus=0.5), progress=take).state == "complete"
    assert taken
    assert any("is gone or cut; the shard is done again" in message for message in messages)
    _whole(spec, expected)


def test_worker_killed_mid_shard_and_constructor_fails_once(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, [*LINES[:15], "die once", *LINES[15:]])
    expected = _undisturbed(spec, tmp_path)  # without orders the row is a row like any other
    (tmp_path / "orders/die-once").touch()
    (tmp_path / "orders/fail-constructor").touch()
    messages: list[str] = []
    result = run(spec, resources=TWO, progress=lambda p: messages.append(p.message or ""))
    assert (result.state, result.ok) == ("complete", 41)
    assert any("the constructor fails this once" in message for message in messages)
    assert any("a worker died on rows 0 to 9 of shard 1" in message for message in messages)
    _whole(spec, expected)


def test_workers_that_hang_are_replaced(tmp_path: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is stopped, one waits for what never comes; nobody noticed, and the run did not end."""
    spec = spec_for(tmp_path, [*LINES[:15], "stop once", *LINES[15:25], "wait once", *LINES[25:]], delay=0.02)
    expected = _undisturbed(spec, tmp_path)
    (tmp_path / "orders/stop-once").touch()
    (tmp_path / "orders/wait-once").touch()
    monkeypatch.setattr("pipeline.run.pool.DEAF_S", 6.0)
    monkeypatch.setattr("pipeline.run.pool.QUIET_S", 12.0)
    messages: list[str] = []
    result = run(spec, resources=TWO, progress=lambda p: messages.append(p.message or ""))
    assert (result.state, result.ok) == ("complete", 42)
    assert any("of shard 1 (its process has not answered for" in message for message in messages)
    assert any("of shard 2 (it has read no row, done none and computed nothing" in message for message in messages)
    _whole(spec, expected)


def test_constructor_that_always_fails_ends_the_run(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, LINES)
    stage = replace(spec.stage, params={**spec.stage.params, "delay": "not a number", "orders": str(tmp_path)})
    (tmp_path / "kill-at").write_text("no_such_step before 1")
    result = run(replace(spec, stage=stage), resources=Resources(cpus=0.5))
    assert result.state == "failed"
    assert "the stage cannot be built" in str(result.reason)


def test_rows_that_kill_and_rows_that_raise(tmp_path: Path, local_ray: str) -> None:
    lines = [*LINES[:12], "die always", *LINES[12:25], "raise", *LINES[25:]]
    spec = spec_for(tmp_path, lines, shard_rows=8)
    gentle = [line.replace("die always", "harmless").replace("raise", "gentle") for line in lines]
    harmless = spec_for(tmp_path, gentle, shard_rows=8)
    expected = _undisturbed(harmless, tmp_path)
    spec_for(tmp_path, lines, shard_rows=8)
    result = run(spec, resources=TWO)
    assert (result.state, result.ok, result.failed) == ("complete", 40, 2)
    assert verify(spec.output).ok
    rows = data(spec.output)
    by_id = {row["id"]: row for row in rows.to_pylist()}
    assert "killed 2 workers" in by_id["in.txt#12"]["error"]
    assert by_id["in.txt#26"]["error"] == "ValueError: cannot digest 'raise'"
    assert by_id["in.txt#12"]["text"] == "die always"
    good = pc.is_in(rows["status"], value_set=pa.array(["ok"]))
    assert rows.filter(good).equals(expected.filter(good))
    assert sum(int(s["count"][0]) for s in Output.open(spec.output).summaries()) >= 40


def test_full_disk(tmp_path: Path, local_ray: str) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        lines = [os.urandom(400).hex() for _ in range(400)]
        spec = spec_for(tmp_path, lines, shard_rows=50)
        expected = _undisturbed(spec, tmp_path)
        spec = replace(spec, output=str(place / "out"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.run.dispatch.RETRY_WAIT_S", 0.05)
            result = run(spec, resources=TWO)
        assert result.state == "failed"
        assert "No space left" in str(result.reason)
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        again = run(spec, resources=TWO)
        assert again.state == "complete"
        _whole(spec, expected)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_cut_deleted_and_foreign_files(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, LINES)
    expected = _undisturbed(spec, tmp_path)
    shutil.copytree(tmp_path / "undisturbed", spec.output)
    out = Path(spec.output)
    parts = sorted(out.glob("data/*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-50])
    parts[1].unlink()
    (out / "data/part-00007-of-00009.parquet").write_bytes(parts[2].read_bytes())
    (out / "_latentmill/attempts").mkdir(exist_ok=True)
    (out / "_latentmill/attempts/stranger.parquet").write_bytes(b"not ours")
    report = verify(spec.output)
    assert not report.ok
    assert report.foreign == ("data/part-00007-of-00009.parquet",)
    assert sum("shard" in problem for problem in report.problems) == 2
    result = run(spec, resources=TWO)
    assert (result.state, result.resumed) == ("complete", 2)
    _whole(spec, expected)
    assert (out / "_latentmill/set-aside/part-00007-of-00009.parquet").exists()
    content = bytearray(parts[3].read_bytes())
    content[100] ^= 255
    parts[3].write_bytes(content)
    assert "not those that were committed" in verify(spec.output).problems[0]
    parts[3].unlink()
    assert run(spec, resources=TWO).state == "complete"
    _whole(spec, expected)


def test_two_runs_on_one_output_and_an_interrupt(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=5, delay=0.2)
    expected = _undisturbed(spec, tmp_path)
    child = _child(spec, local_ray)
    _wait_for_a_record(spec)
    with pytest.raises(OutputLocked, match=str(child.pid)):
        run(spec, resources=TWO)
    assert Output.open(spec.output).status().state == "running"
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["state"] == "interrupted"
    status = Output.open(spec.output).status()
    assert (status.state, status.holder) == ("incomplete", None)
    assert 0 < status.progress.shards_done < 8
    result = run(spec, resources=TWO)
    assert result.state == "complete"
    assert result.resumed >= 1
    _whole(spec, expected)


def test_an_input_that_was_moved_goes_on_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    spec = spec_for(tmp_path, LINES)
    Path(spec.source.path[0]).rename(tmp_path / "rows/in.txt")
    spec = replace(spec, source=replace(spec.source, path=(str(tmp_path / "rows"),)))
    run_plain(spec)
    (tmp_path / "rows").rename(tmp_path / "mounted")
    moved = replace(spec, source=replace(spec.source, path=(str(tmp_path / "mounted"),)))
    with pytest.raises(PlanMismatch, match=r"(?s)input\.path: was .*link them to where they were"):
        run(moved)
    (tmp_path / "rows").symlink_to("mounted")
    assert run(spec).state == "complete"
    _whole(spec, data(spec.output))


def test_changes_are_refused_and_named(tmp_path: Path) -> None:
    spec = replace(spec_for(tmp_path, LINES), config={"solver": {"lr": 0.1}, "steps": 10})
    run_plain(spec)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(spec.output).rglob("*") if p.is_file())
    changed = {
        "config.solver.lr": replace(spec, config={"solver": {"lr": 0.2}, "steps": 10}),
        "shard_rows": replace(spec, shard_rows=11),
        "seed": replace(spec, seed=1),
        "keep": replace(spec, keep=()),
        "limit": replace(spec, limit=5),
    }
    for field, other in changed.items():
        with pytest.raises(PlanMismatch) as caught:
            run(other)
        assert field in caught.value.fields
        assert field in str(caught.value)
    path = Path(spec.source.path[0])
    text = path.read_text()
    path.write_text(text.replace("line 3\n", "LINE 3\n"))
    with pytest.raises(PlanMismatch, match=r"input file in\.txt"):
        run(spec)
    path.write_text(text)  # another time stamp, the same content
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(spec.output).rglob("*") if p.is_file()) == before
    assert run(spec).state == "complete"
    _whole(spec, data(spec.output))
