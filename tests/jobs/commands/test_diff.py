"""``latentmill diff``: beside plain loops over the rows that were written."""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.errors import EXIT_INCOMPLETE, EXIT_USAGE
from jobs.run import run_job
from pipeline.output.diff import Difference, Median
from pipeline.output.diff import diff as compared
from tests.support.in_process import without_ray
from tests.support.toy_job import known


def diff(*words: str) -> Any:
    return CliRunner().invoke(app, ["diff", *words])


def png(value: int, level: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 10, 20)).save(file, "PNG", compress_level=level)
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs: B in another order, other shards, without `r2`, with `new`, and with other lengths."""

    tmp_path = tmp_path_factory.mktemp("diff")

    def run(name: str, ids: list[str], shard_rows: int, **settings: Any) -> Path:
        table = {
            "key": ids, "text": [("fail" if name == "b" and own == "r5" else own) for own in ids],
            "score": [float("nan") if own == "r1" else int(own[1:] or 0) / 3 if own[0] == "r" else 0.0 for own in ids],
            "count": [2**60 + (name == "b" and own == "r6") for own in ids],
            "photo": [{"bytes": png(100 + (name == "b" and own == "r3"), 6 if name == "a" else 1), "path": None}
                      for own in ids],
        }  # fmt: skip
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {own: pa.array(held, kind if own == "photo" else None) for own, held in table.items()}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        source = {"path": str(tmp_path / f"{name}.parquet"), "id": "key"}
        job = {"job": "toy", "input": source, "max_failed_fraction": 1, "shard_rows": shard_rows,
               "keep": ["score", "count", "photo"], **settings}  # fmt: skip
        run_job(job, output=str(tmp_path / name))
        return tmp_path / name

    ids = [f"r{n}" for n in range(9)]
    with known(), pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        first = run("a", ids, 4)
        return first, run("b", ["new", *[own for own in reversed(ids) if own != "r2"]], 3, factor=1.001)


@pytest.fixture
def runs(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(made[0], tmp_path / "a")), Path(shutil.copytree(made[1], tmp_path / "b"))


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for file in sorted((out / "data").glob("*")) for row in pq.read_table(file).to_pylist()}


def test_all_is_found_that_a_plain_loop_finds(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = map(rows, runs)
    common = [own for own in a if own in b and a[own]["status"] == b[own]["status"] == "ok"]
    expected = {("r2", "only in A"), ("new", "only in B"), ("r5", "status"), ("r3", "photo"), ("r6", "count")}
    vectors = {own: (np.array(a[own]["vector"]), np.array(b[own]["vector"])) for own in common}
    expected |= {(own, name) for own in common for name in ("length", "vector")}
    found: list[Difference] = []
    told = compared(str(runs[0]), str(runs[1]), tell=found.append)
    assert {(own.id, own.what) for own in found} == expected
    assert (told.rows_a, told.rows_b, told.both, told.only_a, told.only_b) == (9, 9, 8, 1, 1)
    assert told.statuses == {("ok", "failed"): 1}
    assert told.columns["vector"].max_abs == max(float(np.abs(x - y).max()) for x, y in vectors.values())
    relative = [float(np.linalg.norm(x - y) / max(np.linalg.norm(x), np.linalg.norm(y))) for x, y in vectors.values()]
    assert told.columns["vector"].relative.value == pytest.approx(statistics.median(relative), rel=1e-6)
    assert told.columns["photo"].max_abs == 1.0  # the others are compressed otherwise, and hold the same pixels
    assert told.columns["count"].max_abs is not None  # of two whole numbers that float64 takes for one
    for name, column in told.columns.items():
        assert (column.compared, column.different) == (len(common), sum(own.what == name for own in found))


def test_the_command_tells_it_and_its_exit_code_is_that_of_diff(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = map(str, runs)
    done = diff(a, b, "--csv", str(tmp_path / "all.csv"))
    assert done.exit_code == EXIT_INCOMPLETE
    assert "A 9 rows, B 9 rows; in both 8, only in A 1, only in B 1" in done.output
    assert "status: 1 x ok in A, failed in B" in done.output
    assert "photo    differs in 1 of 7, by 1 at most" in done.output
    assert "changed  same in 7" in done.output
    lines = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert {"id": "r6", "what": "count", "a": str(2**60), "b": str(2**60 + 1)}.items() <= next(
        line for line in lines if line["what"] == "count"
    ).items()
    assert [line["a"] for line in lines if line["what"] == "vector"] == ["4 numbers"] * 7
    assert (diff(a, a).exit_code, diff(b, b, "--tolerance", "1e-9").exit_code) == (0, 0)


def test_tolerance_and_columns(runs: tuple[Path, Path]) -> None:
    a, b = map(str, runs)
    near = compared(a, b, ["length", "vector", "score"], tolerance=0.002)
    assert [column.different for column in near.columns.values()] == [0, 0, 0]
    x, y = (np.array([row["length"] for own, row in rows(run).items() if own == "r1"]) for run in runs)
    assert not np.allclose(x, y, rtol=0.0005, atol=0)
    assert compared(a, b, ["length"], tolerance=0.0005).columns["length"].different == 7
    assert "no column 'colour' in either" in diff(a, b, "--columns", "colour").stderr


def test_what_cannot_be_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    plan = runs[1] / "_latentmill/plan.json"
    told = json.loads(plan.read_text())
    plan.write_text(json.dumps({**told, "config": {**told["config"], "job": "reference"}}))
    refused = diff(*map(str, runs))
    assert refused.exit_code == EXIT_USAGE
    assert "is of the job toy" in refused.stderr
    assert "there is no run in this folder" in diff(str(runs[0]), str(tmp_path / "none")).stderr


def test_unfinished_runs_are_compared_as_far_as_they_are(runs: tuple[Path, Path]) -> None:
    (runs[1] / "_SUCCESS").unlink()
    assert f"{runs[1]} is unfinished" in diff(*map(str, runs)).output


def test_a_median_of_more_values_than_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.diff.HELD", 64)
    median = Median()
    values = np.random.default_rng(0).permutation(5000) / 5000
    for value in values:
        median.add(value)
    assert median.value == pytest.approx(np.median(values), abs=0.2)
    assert len(median._values) < 64
