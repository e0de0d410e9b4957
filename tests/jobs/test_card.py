"""The dataset card and the files: read with no code of ours, with and without Ray imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from skimage import data as photographs

from jobs.run import JobResult, run_job
from jobs.schema.base import RowJob
from pipeline.output.dataset import Output
from tests.support.toy_job import Toy

NAMES = ("astronaut", "coffee", "chelsea")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> JobResult:
    """Photographs, captions with every kind of trap in them, and a picture that is none."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("card")
    texts = ["plain", "with | pipes, <b>tags</b> and\n---\nlines", "東京 \u202e \x07"]
    for name, text in zip(NAMES, texts, strict=True):
        Image.fromarray(getattr(photographs, name)()).resize((96, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    job = {
        "job": "toy",
        "input": {"path": str(folder), "format": "images"},
        "keep": ["text", "image"],
        "max_failed_fraction": 1,
        "shard_rows": 3,
    }
    registered = Toy.model_validate({**job, "resources": {"cpus": 0.5}})
    return run_job(registered, output=str(folder.parent / "out"))


def test_counts(result: JobResult) -> None:
    assert (result.state, result.planned, result.ok, result.failed) == ("complete", 4, 3, 1)


READ = """
import json, sys
{first}
from datasets import load_dataset
rows = load_dataset({path!r}, split="train", cache_dir={cache!r})
row = next(row for row in rows if row["status"] == "ok")
print(json.dumps({{
    "features": {{name: type(kind).__name__ for name, kind in rows.features.items()}},
    "size": row["grey"].size, "mode": row["grey"].mode, "vector": row["vector"], "length": row["length"],
    "statuses": sorted(rows["status"]), "ray": "ray" in sys.modules,
    "failed": next([row["grey"], row["length"], row["error"]] for row in rows if row["status"] == "failed"),
}}))
"""


def test_two_datasets_of_one_folder_name_do_not_share_a_cache(
    tmp_path: Path, toy_job: type[RowJob], local_ray: str
) -> None:
    from datasets import load_dataset

    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
        run_job({"job": "toy", "input": str(tmp_path / f"{name}.txt")}, output=str(tmp_path / name / "out"))
    for name in ("first", "second"):
        rows = load_dataset(str(tmp_path / name / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        assert list(rows["id"]) == [f"{name}.txt#0"]


@pytest.mark.parametrize("first", ["", "import ray", "import ray.data"])
def test_datasets_decodes_pictures_and_vectors(result: JobResult, tmp_path: Path, first: str) -> None:
    code = READ.format(first=first, path=result.output, cache=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["features"]["grey"] == found["features"]["image"] == "Image"
    assert found["features"]["vector"] == "List"
    assert (found["size"], found["mode"]) == ([96, 64], "RGB")
    assert found["vector"] == [found["length"]] * 4
    assert found["statuses"] == ["failed", "ok", "ok", "ok"]
    assert found["failed"][:2] == [None, None]
    assert found["failed"][2]
    assert found["ray"] is bool(first)


def test_duckdb_and_polars_read_the_same_files(result: JobResult) -> None:
    import duckdb
    import polars

    query = f"SELECT id, length, list_sum(vector::FLOAT[]) AS sum FROM '{result.data}' WHERE status = 'ok' ORDER BY 1"
    by_duckdb = duckdb.sql(query).fetchall()
    frame = polars.read_parquet(result.data).filter(polars.col("status") == "ok").sort("id")
    assert frame["id"].to_list() == [row[0] for row in by_duckdb]
    assert frame["length"].to_list() == [row[1] for row in by_duckdb]
    assert np.allclose([np.sum(vector) for vector in frame["vector"].to_list()], [row[2] for row in by_duckdb])
    assert set(polars.read_parquet(result.data)["status"].to_list()) == {"ok", "failed"}


def test_the_card_names_columns_settings_counts_and_measures(result: JobResult) -> None:
    text = (Path(result.output) / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [{"split": "train", "path": "data/part-*.parquet"}]
    assert Toy.__doc__ is not None
    assert Toy.__doc__.split(".")[0] in body
    settings = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert settings == {"job": "toy", "mode": "upper", "factor": 1.0, "seed": 0}
    assert "4 rows in 2 files: 3 processed, 1 failed" in body
    for column in Output.open(result.output).plan["columns"]:
        assert f"| `{column}` |" in body
    mean = result.measures["length"]["mean"]
    assert f"| `length` | 3 | {mean:.4g} |" in body
    assert "load_dataset(" in body
