"""What Python users call: planning, running, reading what was written, a stage alone."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import latentmill
from jobs.kinds.chain import write_listing
from pipeline.output.planfile import OutputError
from tests.support.in_process import without_ray

VECTORS = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """A job, the folder that it was run to, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "vectors.npy", VECTORS)
    job = {"job": "reference", "input": str(folder / "vectors.npy"), "given": "embeddings", "dim": 4, "shard_rows": 15}
    with pytest.MonkeyPatch().context() as patch, redirect_stdout(io.StringIO()) as printed:
        without_ray(patch)
        result = latentmill.run_job(job, output=str(folder / "out"), progress=latentmill.print_progress())
    assert (result.state, result.ok) == ("complete", 40)
    return job, result.output, printed.getvalue()


def test_a_plan_has_the_figures_of_the_run_and_writes_nothing(run: tuple[dict[str, Any], str, str]) -> None:
    job, output, _ = run
    new = Path(output).parent / "new"
    (planned,) = latentmill.plan(job, output=str(new))
    assert planned.plan is not None
    assert (planned.plan.rows, planned.plan.shards, planned.output) == (40, 3, str(new))
    assert not new.exists()
    (shorter,) = latentmill.plan(latentmill.load_job(job), limit=20)
    assert shorter.plan is not None
    assert (shorter.plan.rows, shorter.plan.shards) == (20, 2)
    (larger,) = latentmill.plan(job, overrides=["shard_rows=40"])
    assert larger.plan is not None
    assert larger.plan.shards == 1


def test_overrides_of_a_job_model_are_refused_and_not_passed_over(run: tuple[dict[str, Any], str, str]) -> None:
    with pytest.raises(latentmill.JobFileError, match=r"overrides \(seed=3\) .* change the job model"):
        latentmill.plan(latentmill.load_job(run[0]), overrides=["seed=3"])
    with pytest.raises(latentmill.JobFileError, match="change the job model"):
        latentmill.run_job(latentmill.load_job(run[0]), output="out", overrides=["seed=3"])


def test_progress_is_whole_lines_that_are_never_gone_back_over(run: tuple[dict[str, Any], str, str]) -> None:
    printed = run[2]
    assert printed.endswith("\n")
    assert not set("\r\b\x1b") & set(printed)
    assert any(line.startswith("complete  100%  40/40 rows") for line in printed.splitlines())


def test_a_dataset_holds_the_rows_of_the_published_files(run: tuple[dict[str, Any], str, str]) -> None:
    rows = latentmill.open_dataset(run[1])
    files = sorted((Path(run[1]) / "data").glob("part-*.parquet"))
    assert len(files) == 3
    own = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert rows.to_table().to_pylist() == own
    np.testing.assert_array_equal([row["embedding"] for row in own], VECTORS)
    some = rows.to_table(columns=["id"], filter=pc.field("id") == own[7]["id"])
    assert some.to_pylist() == [{"id": own[7]["id"]}]


def test_a_dataset_of_an_unfinished_run_is_refused(run: tuple[dict[str, Any], str, str]) -> None:
    success = Path(run[1]) / "_SUCCESS"
    kept = success.read_bytes()
    success.unlink()
    try:
        with pytest.raises(OutputError, match="the run is not finished; run the job again"):
            latentmill.open_dataset(run[1])
    finally:
        success.write_bytes(kept)
    with pytest.raises(OutputError, match="no run in this folder"):
        latentmill.open_dataset(str(Path(run[1]).parent))


def test_a_dataset_of_a_chain_is_that_of_a_step(run: tuple[dict[str, Any], str, str], tmp_path: Path) -> None:
    step = latentmill.load_job({**run[0], "output": run[1]})
    write_listing(str(tmp_path), [("first", step), ("second", step)])
    assert latentmill.open_dataset(str(tmp_path), step="second").count_rows() == 40
    with pytest.raises(ValueError, match=r"is a chain's folder; its steps: first, second\. Say which: step='first'"):
        latentmill.open_dataset(str(tmp_path))
    with pytest.raises(ValueError, match=r"has no step 'third'; its steps: first, second"):
        latentmill.open_dataset(str(tmp_path), step="third")
    with pytest.raises(ValueError, match=r"is no chain's folder, so it has no step 'first'"):
        latentmill.open_dataset(run[1], step="first")


def test_a_stage_by_name_maps_rows_without_files() -> None:
    stage = latentmill.stage("reference", given="embeddings", dim=4)
    rows = [{"id": str(number), "embedding": vector} for number, vector in enumerate(VECTORS[:3])]
    found = {row["id"]: row for row in stage(iter(rows))}
    assert {row["status"] for row in found.values()} == {"ok"}
    np.testing.assert_array_equal([found[str(number)]["embedding"] for number in range(3)], VECTORS[:3])


def test_a_stage_that_is_none_is_told() -> None:
    with pytest.raises(latentmill.JobFileError, match=r"unknown kind of job 'referenc'\. Did you mean 'reference'"):
        latentmill.stage("referenc")
    with pytest.raises(latentmill.JobFileError, match="a chain has no stage of its own"):
        latentmill.stage("chain", steps=[{"job": "reference", "input": "x", "encoder": "micro:prior"}])
