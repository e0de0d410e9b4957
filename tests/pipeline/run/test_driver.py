"""Whole runs on Ray: the same rows whatever the split, readable by others, honest about failure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contract import StageSpec
from pipeline.input.source import Source
from pipeline.output.dataset import Output
from pipeline.output.planfile import OutputError
from pipeline.output.progress import Progress
from pipeline.output.verify import verify
from pipeline.run.driver import Finished, Resources, calibrate, run
from tests.support.faulty import data, run_plain, spec_for

LINES = [f"line {i}" for i in range(60)]


def test_same_rows_whatever_the_workers_and_shard_sizes(tmp_path: Path, local_ray: str) -> None:
    first = spec_for(tmp_path, LINES)
    reference = data(run_plain(replace(first, output=str(tmp_path / "plain"))).path)
    for workers in (1, 2, 4):
        for shard_rows in (7, 20, 100):
            spec = replace(first, output=str(tmp_path / f"{workers}-{shard_rows}"), shard_rows=shard_rows)
            result = run(spec, resources=Resources(max_workers=workers, cpus=0.5))
            assert (result.state, result.ok, result.shards) == ("complete", 60, -(-60 // shard_rows))
            assert verify(spec.output).ok
            assert data(spec.output).equals(reference)


def test_readers_finish_summaries_status_and_progress(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, [*LINES, "please refuse this"], shard_rows=25)
    seen: list[Progress] = []
    counts: list[int] = []

    def finish(finished: Finished) -> None:
        counts.extend(int(summary["count"][0]) for summary in finished.summaries())
        counts.append(sum(table.num_rows for table in finished.tables(["id"])))
        with finished.output.open_file("extra/notes.json", "wb") as handle:
            handle.write(b"{}")

    result = run(spec, finish=finish, progress=seen.append, title="A title", description=lambda finished: "Words.")
    assert (result.state, result.ok, result.failed, result.errors) == ("complete", 60, 1, {"refused": 1})
    assert counts == [25, 25, 10, 61]
    assert result.measures["length"]["n"] == 60
    assert (seen[0].phase, seen[-1].phase, seen[-1].rows_ok) == ("planning", "complete", 60)
    status = Output.open(spec.output).status()
    assert (status.state, status.progress.rows_failed, status.holder) == ("complete", 1, None)
    assert "path: data/part-*.parquet" in (tmp_path / "out/README.md").read_text()
    again = run(spec, finish=finish)  # nothing left to do: finish is not called
    assert (again.state, again.resumed, len(counts)) == ("complete", 3, 4)
    _check_readers(spec.output)


def _check_readers(path: str) -> None:
    import datasets
    import duckdb
    import polars

    rows = datasets.load_dataset(path, split="train", cache_dir=f"{path}/../cache")
    assert rows.num_rows == 61
    assert isinstance(rows.features["vector"], datasets.List)
    assert rows.features["vector"].length == 6
    expected = data(path)["vector"].to_pylist()
    assert np.allclose(rows[3]["vector"], expected[3])
    query = f"select count(*), sum(length), max(vector[4]) from '{path}/data/*.parquet'"
    counted = duckdb.connect().execute(query).fetchall()[0]
    assert counted[:2] == (61, sum(len(line) for line in LINES))
    assert np.isclose(counted[2], max(vector[3] for vector in expected if vector))
    assert polars.read_parquet(f"{path}/data/*.parquet")["upper"].null_count() == 1


def test_pictures_are_decoded_by_datasets(tmp_path: Path, local_ray: str) -> None:
    import datasets

    stage = StageSpec("tests.support.toy_job:Letters", {"mode": "upper", "factor": 2.0})
    source = Source(("micro-world://heldout?rows=5&seed=3",), columns={"image": "image", "text": "caption"})
    first = spec_for(tmp_path, [])
    spec = replace(first, stage=stage, source=source, shard_rows=2, keep=("image", "text", "scene"))
    assert run(spec).state == "complete"
    assert verify(spec.output).ok
    rows = datasets.load_dataset(spec.output, split="train", cache_dir=str(tmp_path / "cache"))
    assert [rows[0][name].size for name in ("image", "grey")] == [(64, 64), (64, 64)]
    from micro.world import picture

    assert np.array_equal(np.asarray(rows[4]["image"]), picture(4, "heldout", 3))
    grey = np.asarray(rows[4]["grey"])
    assert (grey[..., 0] == grey[..., 1]).all()
    chained = replace(spec, source=Source((spec.output,), columns={"text": "text"}), output=str(tmp_path / "second"),
                      keep=("text",))  # fmt: skip
    assert run(chained).state == "complete"
    assert data(chained.output)["id"].to_pylist() == data(spec.output)["id"].to_pylist()


def test_too_many_failures_stop_the_run_and_a_higher_limit_resumes_it(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, ["refuse"] * 20 + LINES, shard_rows=10)
    result = run(spec, max_failed_fraction=0.1)
    assert result.state == "failed"
    assert "max_failed_fraction" in str(result.reason)
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert run(spec, max_failed_fraction=0.5).state == "complete"
    assert verify(spec.output).ok


def test_calibration_and_clear_refusals(tmp_path: Path, local_ray: str) -> None:
    spec = spec_for(tmp_path, LINES, delay=0.01)
    timed = calibrate(spec, rows=10)
    assert timed.rows == 10
    assert 0.01 <= timed.seconds_per_row < 1
    assert timed.fits == 6
    several = replace(spec, source=replace(spec.source, variants={"method": ("a", "b", "c")}))
    assert calibrate(several, rows=4).rows == 6  # every method of two rows
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        run(replace(spec, output=str(tmp_path / "taken")))
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]


def test_file_metadata_says_where_the_data_comes_from(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    output = run_plain(spec_for(tmp_path, LINES))
    part = Path(output.path) / output.part(0)
    schema = pq.read_schema(part)
    note: dict[str, Any] = json.loads(schema.metadata[b"latentmill"])
    assert note["metadata"] == {"scaling_factor": "0.18215"}
    assert json.loads(schema.field("vector").metadata[b"shape"]) == [2, 3]
    group = pq.ParquetFile(part).metadata.row_group(0)
    columns = {group.column(i).path_in_schema.partition(".")[0]: group.column(i) for i in range(group.num_columns)}
    assert columns["vector"].compression == "ZSTD"
    assert not any("DICTIONARY" in encoding for encoding in columns["vector"].encodings)


def test_counts_for_prometheus(tmp_path: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches Ray's metrics; Ray serving it was tried by hand, as it takes ``ray[default]``."""
    from ray.util import metrics

    counted: dict[tuple[str, str], float] = {}
    count = metrics.Counter.inc

    def inc(self: Any, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        key = (self.info["name"], (tags or {}).get("status", ""))
        assert (tags or {})["output"] == spec.output
        counted[key] = counted.get(key, 0) + value
        count(self, value, tags)  # Ray checks names and tags

    monkeypatch.setattr(metrics.Counter, "inc", inc)
    spec = spec_for(tmp_path, ["please refuse this", *LINES, "die once"], shard_rows=20)
    (tmp_path / "orders/die-once").touch()
    result = run(spec)
    assert (result.state, result.failed) == ("complete", 1)
    expected = {
        ("rows", "ok"): result.ok, ("rows", "failed"): 1, ("shards", ""): 4,
        ("worker_deaths", ""): 1, ("task_failures", ""): 1, ("retries", ""): 1,
    }  # fmt: skip
    assert counted == {(f"latentmill_{name}", status): value for (name, status), value in expected.items()}
