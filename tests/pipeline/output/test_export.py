"""``latentmill export``: each layout read by somebody else's reader, beside the rows that the run wrote."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.run import run_job
from pipeline.input.rows import picture_type
from pipeline.output.dataset import Output
from pipeline.output.training_set import Layout, writer
from tests.support.in_process import without_ray
from tests.support.toy_job import known

ROWS, FAILS = 7, 4


def png(value: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 3 * value, 90)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows in shards of three, one failed, one without a latent."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    z_NE = rng.normal(size=(ROWS, 6)).astype(np.float32)
    latent_N8 = rng.normal(size=(ROWS, 8)).astype(np.float16)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    noted = pa.field("latent", pa.list_(pa.float16(), 8), metadata={"shape": "[2, 4]", "dtype": "float16"})
    fields = [
        pa.field("key", pa.string()), pa.field("text", pa.string()), pa.field("image", kind), pa.field("twin", kind),
        pa.field("embedding", pa.list_(pa.float32(), 6)), noted, pa.field("score", pa.float64()),
    ]  # fmt: skip
    rows = [
        {"key": f"a/{n}.x", "text": "fail" if n == FAILS else f"a star {n}", "image": png(10 * n),
         "twin": png(20 * n), "embedding": z_NE[n].tolist(),
         "latent": None if n == 2 else latent_N8[n], "score": n / 3}
        for n in range(ROWS)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), folder / "rows.parquet")
    job = {"job": "toy", "input": {"path": str(folder / "rows.parquet"), "id": "key"}, "shard_rows": 3,
           "max_failed_fraction": 1, "keep": [field.name for field in fields if field.name != "key"]}  # fmt: skip
    with known(), pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_job(job, output=str(folder / "out"))
    return folder / "out"


@pytest.fixture
def rows(out: Path) -> dict[str, dict[str, Any]]:
    files = sorted((out / "data").glob("*"))
    found = {row["id"]: row for file in files for row in pq.read_table(file).to_pylist() if row["status"] == "ok"}
    assert list(found) == [f"a/{n}.x" for n in range(ROWS) if n != FAILS]
    return found


def export(out: Path, dest: Any, to: str, *more: str) -> Any:
    return CliRunner().invoke(app, ["export", str(out), str(dest), "--to", to, *more])


def pixels(data: Any) -> Any:
    picture = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
    return np.asarray(picture.convert("RGB"))


def test_tars_hold_each_row_once_with_its_arrays(out: Path, tmp_path: Path, rows: dict[str, dict[str, Any]]) -> None:
    done = export(out, tmp_path / "tars", "webdataset")
    assert (done.exit_code, "6 rows in" in done.output) == (0, True), done.stderr
    assert "1 that failed or are duplicates are left out" in done.output
    read = load_dataset("webdataset", data_files=str(tmp_path / "tars/*.tar"), split="train", cache_dir=str(tmp_path))
    assert [row["json"]["id"] for row in read] == list(rows)
    for row in read:
        expected = rows[row["json"]["id"]]
        assert row["txt"] == expected["text"]
        assert (pixels(row["png"]) == pixels(expected["image"]["bytes"])).all()
        assert row["json"]["score"] == expected["score"]
    members: dict[str, bytes] = {}
    with tarfile.open(tmp_path / "tars/train-000000.tar") as tar:
        for own in tar:
            members[own.name] = tar.extractfile(own).read()  # type: ignore[union-attr]
    for name in ("latent", "embedding", "vector"):
        arrays = [np.load(io.BytesIO(data)) for own, data in members.items() if own.endswith(f".{name}.npy")]
        for array, row in zip(arrays, rows.values(), strict=True):
            expected = np.full(8, np.nan) if row[name] is None else np.array(row[name])
            np.testing.assert_array_equal(array.reshape(-1), expected)
        assert {array.shape for array in arrays} == {{"latent": (2, 4), "embedding": (6,), "vector": (2, 2)}[name]}
    assert sum(name.endswith(".twin.png") for name in members) == 6


def test_a_folder_of_pictures(out: Path, tmp_path: Path, rows: dict[str, dict[str, Any]]) -> None:
    done = export(out, tmp_path / "folder", "imagefolder")
    assert "left out: embedding, latent, vector (a folder of pictures holds no arrays)" in done.stderr
    read = load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path))
    assert [row["id"] for row in read] == list(rows)
    for row in read:
        for name in ("image", "twin"):
            assert (pixels(row[name]) == pixels(rows[row["id"]][name]["bytes"])).all()
        assert row["changed"] == rows[row["id"]]["changed"]


def test_embeddings_in_clip_retrieval_s_layout(out: Path, tmp_path: Path, rows: dict[str, dict[str, Any]]) -> None:
    export(out, tmp_path / "npy", "npy")
    names = sorted(str(path.relative_to(tmp_path / "npy")) for path in (tmp_path / "npy").rglob("*.*"))
    assert names == [f"img_emb/img_emb_{n}.npy" for n in range(3)] + [
        f"metadata/metadata_{n}.parquet" for n in range(3)
    ]
    unit_NE = np.concatenate([np.load(tmp_path / "npy" / name) for name in names[:3]])
    told = pa.concat_tables([pq.read_table(tmp_path / "npy" / name) for name in names[3:]]).to_pylist()
    for z_E, fact, row in zip(unit_NE, told, rows.values(), strict=True):
        raw_E = np.array(row["embedding"], np.float64)
        assert z_E == pytest.approx(raw_E / np.sqrt((raw_E**2).sum()), abs=1e-6)
        assert (fact["image_path"], fact["caption"], fact["score"]) == (row["id"], row["text"], row["score"])


def test_stacked_tensors(out: Path, tmp_path: Path, rows: dict[str, dict[str, Any]]) -> None:
    export(out, tmp_path / "tensors", "safetensors", "--columns", "latent", "--columns", "vector")
    ids, latents, vectors = [], [], []
    for file in sorted((tmp_path / "tensors").iterdir()):
        with safe_open(file, "numpy") as held:
            ids += json.loads(held.metadata()["ids"])
            latents.append(held.get_tensor("latent"))
            vectors.append(held.get_tensor("vector"))
    assert ids == list(rows)
    all_N24 = np.concatenate(latents)
    assert (all_N24.dtype, all_N24.shape) == (np.float16, (6, 2, 4))
    for n, row in enumerate(rows.values()):
        if row["latent"] is None:
            assert np.isnan(all_N24[n]).all()
        else:
            assert all_N24[n].tolist() == np.array(row["latent"]).reshape(2, 4).tolist()
        assert np.concatenate(vectors)[n].reshape(-1).tolist() == row["vector"]


def test_parquet_keeps_types_and_pictures(out: Path, tmp_path: Path, rows: dict[str, dict[str, Any]]) -> None:
    export(out, tmp_path / "parquet", "parquet")
    read = pq.read_table(tmp_path / "parquet/train.parquet")
    assert read.to_pylist() == [
        {key: value for key, value in row.items() if key not in ("status", "error")} for row in rows.values()
    ]
    assert b"Image" in read.schema.metadata[b"huggingface"]
    assert read.schema.field("latent").metadata[b"shape"] == b"[2, 4]"


def test_a_store_as_the_place(out: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    try:
        for to in ("webdataset", "imagefolder"):
            assert export(out, f"memory://exported/{to}", to).exit_code == 0
            export(out, tmp_path / to, to)
            for file in (tmp_path / to).rglob("*.*"):
                assert store.cat_file(f"/exported/{to}/{file.relative_to(tmp_path / to)}") == file.read_bytes()
    finally:
        store.rm("/exported", recursive=True)


def test_a_second_picture_may_be_missing(tmp_path: Path) -> None:
    pictures = {"image": [png(1), png(2)], "twin": [None, png(3)]}
    table = {name: pa.array(held, picture_type()) for name, held in pictures.items()}
    with writer("imagefolder", str(tmp_path), open_made) as files:
        files.add("train", pa.table({"id": ["a", "b"], **table}))
    read = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["twin"] is None for row in read] == [True, False]
    assert (pixels(read[1]["twin"]) == pixels(png(3)["bytes"])).all()


def open_made(name: str, mode: str) -> Any:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    return open(name, mode)


def without_twin(table: pa.Table) -> pa.Table:
    if "twin" not in table.column_names:
        return table
    pairs = zip(table["id"].to_pylist(), table["twin"].to_pylist(), strict=True)
    twins = [None if own == "a/2.x" else twin for own, twin in pairs]
    at = table.column_names.index("twin")
    return table.set_column(at, "twin", pa.array(twins, table["twin"].type))


def test_what_cannot_be_exported(out: Path, tmp_path: Path) -> None:
    def said(*words: str, to: str = "webdataset", dest: Path = tmp_path / "new") -> str:
        done = export(out, dest, to, *words)
        assert (done.exit_code, "Traceback" in done.stderr) == (2, False)
        return str(done.stderr)

    assert "is not empty" in said(dest=out)
    assert "no column 'colour'" in said("--columns", "colour")
    assert "has no column 'embedding'" in said("--columns", "latent", to="npy")
    with pytest.MonkeyPatch.context() as patch:
        tables = Output.tables
        patch.setattr(Output, "tables", lambda self, columns: map(without_twin, tables(self, columns)))
        assert "row 'a/2.x' is ok and has no twin" in said("--columns", "twin", to="imagefolder")
        done = export(out, tmp_path / "partly", "webdataset")
    assert "left out: twin (some rows have none" in done.stderr
    with tarfile.open(tmp_path / "partly/train-000000.tar") as tar:
        assert not [name for name in tar.getnames() if "twin" in name]
    assert "no column of pictures" in said("--columns", "text", to="imagefolder")
    assert "no column of arrays of one size" in said("--columns", "text", to="safetensors")
    (out / "_SUCCESS").rename(out / "_LATER")
    try:
        assert "is unfinished" in said()
    finally:
        (out / "_LATER").rename(out / "_SUCCESS")
    assert not (tmp_path / "new").exists()


EVIL = ("../../escaped", "/tmp/escaped", "..", ".", "a/../../b", "x\0y", "new\nline", "a" * 5000, "<img src=x>")


@pytest.mark.parametrize("layout", ["imagefolder", "webdataset"])
def test_ids_and_classes_of_a_stranger_name_files_below_the_folder(tmp_path: Path, layout: Layout) -> None:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    cells = pa.array([{"bytes": file.getvalue(), "path": own} for own in EVIL], picture_type())
    rows = pa.table({"id": EVIL, "label": EVIL, "image": cells})

    def opened(name: str, mode: str) -> Any:
        path = tmp_path / "out" / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open(mode)

    with writer(layout, "", opened) as files:
        files.add("train", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = [str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png")]
    for tar in tmp_path.rglob("*.tar"):
        with tarfile.open(tar) as members:
            names += [name for name in members.getnames() if name.endswith(".png")]
    assert len(set(names)) == len(EVIL)
    assert all(re.fullmatch(r"(train/)?([\w-]+/)?[\w-]+\.png", name) for name in names), names
