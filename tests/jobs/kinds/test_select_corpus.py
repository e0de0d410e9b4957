"""The job select-corpus: from a pool of pictures to a training set that `datasets` loads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from jobs.dry_run import plan_job
from jobs.kinds.select_corpus import SelectCorpus
from jobs.run import run_job
from jobs.schema.reading import JobFileError, load
from pipeline.output.training_set import split_of
from pipeline.output.verify import verify
from tests.support.looked_through import look_through

pytestmark = pytest.mark.usefixtures("in_process")
REASONS = {"copy of", "too near", "enough", "below score", "failed", "no score"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in two classes, in each of which one stands twice, one cannot be read and one has no score."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        name = f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name)
        score = None if number in (8, 9) else float(20 - number)
        rows.append(
            {"id": f"a/{number}", "image": name, "kind": ("red star", "ring")[number % 2], "score": score, "note": "x"}
        )
    for number in (2, 3):  # the same as the best of their class
        (folder / f"{number:02d}.png").write_bytes((folder / f"{number - 2:02d}.png").read_bytes())
    (folder / "10.png").write_bytes(b"no picture")
    (folder / "addresses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        row["image"] = {"bytes": (folder / str(row["image"])).read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist(rows), folder / "pool.parquet")
    return folder


def job(pool: Path, prior: str, **more: Any) -> dict[str, Any]:
    return {
        "job": "select-corpus", "input": {"path": str(pool / "pool.parquet"), "id": "id"}, "by": "kind",
        "encoder": prior, "batch_size": 4, "shard_rows": 5, "count": 2, "share": 1, "near": 0.99999, **more,
    }  # fmt: skip


def told(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(out / "selection.parquet").to_pylist()}


def files(out: Path) -> dict[str, bytes]:
    named = [out / name for name in ("selection.parquet", "balance.json", "classes.json")]
    found = [*named, *(path for path in (out / "corpus").rglob("*") if path.is_file())]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_every_candidate_is_kept_or_says_why(pool: Path, prior: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run_job(job(pool, prior, count=9), output=str(out))
    assert (ended.state, ended.ok, ended.failed) == ("complete", 11, 1)
    rows = told(out)
    assert {own: row["why"] for own, row in rows.items() if row["why"]} == {
        "a/2": "too near a/0", "a/3": "too near a/1", "a/8": "no score", "a/9": "no score", "a/10": "failed",
    }  # fmt: skip
    assert all(row["kept"] is (row["why"] is None) for row in rows.values())
    assert json.loads((out / "balance.json").read_text())["red star"] == {
        "candidates": 6, "kept": 3, "asked": 9, "dropped": {"failed": 1, "no score": 1, "too near": 1},
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "3 of 9" in page
    assert "1 failed, 1 no score, 1 too near" in page
    look_through(out)
    assert not verify(str(out)).problems
    (out / "selection.parquet").unlink()
    assert verify(str(out)).problems


@pytest.mark.parametrize("layout", ["parquet", "imagefolder", "webdataset"])
def test_datasets_loads_what_was_kept(layout: str, pool: Path, prior: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_job(job(pool, prior, export=layout, test=0.4, count=9), output=str(out))
    chosen = {own: row for own, row in told(out).items() if row["kept"]}
    pictures = {f"a/{n}": np.asarray(Image.open(pool / f"{n:02d}.png")) for n in range(12) if f"a/{n}" in chosen}
    found = {}
    where = {"data_files": {s: f"{out}/corpus/{s}-*.tar" for s in ("train", "test")}}
    given = where if layout == "webdataset" else {"data_dir": str(out / "corpus")}
    for split, rows in load_dataset(layout, **given, cache_dir=str(tmp_path / "cache")).items():
        for row in rows:
            facts = row["json"] if layout == "webdataset" else row
            picture = row["png"] if layout == "webdataset" else row["image"]
            assert np.array_equal(np.asarray(picture), pictures[facts["id"]])
            assert (facts["label"], facts["class"]) == ("red star", 0) or (facts["label"], facts["class"]) == (
                "ring",
                1,
            )
            assert (facts["label"], facts["score"]) == tuple(chosen[facts["id"]][name] for name in ("label", "score"))
            assert split == split_of(facts["id"], 0.4)
            if layout == "webdataset":
                assert row["cls"] == facts["class"]
            found[facts["id"]] = split
    assert found.keys() == chosen.keys()
    assert set(found.values()) == {"train", "test"}


@pytest.mark.parametrize("layout", ["parquet", "imagefolder", "webdataset"])
def test_a_lost_product_is_made_again_with_the_same_bytes(layout: str, pool: Path, prior: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_job(job(pool, prior, export=layout), output=str(out))
    first = files(out)
    (out / "balance.json").unlink()
    run_job(job(pool, prior, export=layout), output=str(out))
    assert first == files(out)


def test_weights_mix_origins_in_the_shares_that_were_asked_for(pool: Path, prior: str, tmp_path: Path) -> None:
    """Shares 3 (grown) and 1 (real, without a method): three quarters of the weight are of the grown rows."""
    rows = pq.read_table(pool / "pool.parquet").to_pylist()
    table = pa.Table.from_pylist([{**row, "method": "slerp" if n % 3 == 0 else None} for n, row in enumerate(rows)])
    pq.write_table(table, tmp_path / "pool.parquet")
    mixture = {"by": "method", "weights": {"slerp": 3, "none": 1, "nao": 7}}
    source = {"path": str(tmp_path / "pool.parquet"), "id": "id"}
    run_job(job(pool, prior, input=source, mixture=mixture, count=9), output=str(tmp_path / "out"))
    kept = pq.read_table(tmp_path / "out" / "corpus" / "train.parquet").to_pylist()
    grown = [row["weight"] for row in kept if row["method"] == "slerp"]
    real = [row["weight"] for row in kept if row["method"] is None]
    assert (len(grown), len(real)) == (2, 5)
    assert len(set(grown)) == len(set(real)) == 1
    assert sum(grown) / sum(grown + real) == pytest.approx(3 / 4)
    assert sum(grown + real) == pytest.approx(len(kept))
    lacking = job(pool, prior, input=source, mixture={"by": "method", "weights": {"slerp": 1}})
    with pytest.raises(ValueError, match=r"row 'a/1' has 'nothing' in the column 'method', which has no weight"):
        run_job(lacking, output=str(tmp_path / "two"))


@pytest.fixture(scope="module")
def grown(pool: Path) -> dict[str, Any]:
    """The pool as an earlier run wrote it, and beside it a user's own pictures, in one of whose columns something else
    stands than a run writes there."""
    rows = pq.read_table(pool / "pool.parquet").to_pylist()
    for name in ("grown", "own"):
        (pool / name).mkdir()
    made = [
        {
            **row, "method": "slerp", "number": n, "job_seed": 7, "parents": f'[{{"id": "p{n}"}}]',
            "status": "ok", "error": None,
        }
        for n, row in enumerate(rows[:8])
    ]  # fmt: skip
    table = pa.Table.from_pylist(made)
    pq.write_table(table.replace_schema_metadata({b"latentmill": b"{}"}), pool / "grown" / "part.parquet")
    own = [{**row, "number": "eleven", "guide": "mine"} for row in rows[8:]]
    pq.write_table(pa.Table.from_pylist(own), pool / "own" / "part.parquet")
    return {"path": [str(pool / name) for name in ("grown", "own")], "id": "id"}


def test_every_row_says_where_it_comes_from_without_being_asked(
    grown: dict[str, Any], pool: Path, prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run wrote is kept; not what a user's table happens to call by such a name, nor what the two
    tables have in two types. A folder whose plan was made before goes on without."""
    asked = job(pool, prior, input=grown, score_column=None, count=9)
    with monkeypatch.context() as before:
        before.setattr(SelectCorpus, "offered", ())
        run_job(asked, output=str(tmp_path / "old"))
    plain = files(tmp_path / "old")
    (tmp_path / "old" / "classes.json").unlink()
    assert run_job(asked, output=str(tmp_path / "old")).state == "complete"
    assert files(tmp_path / "old") == plain
    run_job(asked, output=str(tmp_path / "new"))
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "new" / "corpus" / "train.parquet").to_pylist()}
    columns = {"id", "image", "label", "class"}
    assert all(row.keys() == columns | {"method", "job_seed", "parents"} for row in rows.values())
    told_of = {own: (row["method"], row["job_seed"], row["parents"]) for own, row in rows.items()}
    assert told_of["a/4"] == ("slerp", 7, '[{"id": "p4"}]')
    assert told_of["a/11"] == (None, None, None)
    old = pq.read_table(tmp_path / "old" / "corpus" / "train.parquet")
    assert (set(old.column_names), old["id"].to_pylist()) == (columns, list(rows))


def test_shards_decide_nothing(pool: Path, prior: str, tmp_path: Path) -> None:
    run_job(job(pool, prior, export="webdataset"), output=str(tmp_path / "one"))
    run_job(job(pool, prior, export="webdataset", shard_rows=12), output=str(tmp_path / "two"))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_copies_of_a_reference_are_dropped(pool: Path, prior: str, tmp_path: Path) -> None:
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "mine.png").write_bytes((pool / "04.png").read_bytes())
    (tmp_path / "known" / "other.png").write_bytes((pool / "05.png").read_bytes())
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 200 - 20 * number, 90)).save(tmp_path / "known" / f"{number}.png")
    reference = {"job": "reference", "input": {"path": str(tmp_path / "known")}, "encoder": prior, "batch_size": 4}
    run_job(reference, output=str(tmp_path / "reference"))
    more = {"against": str(tmp_path / "reference"), "copy_cosine": 0.99999, "count": 9}
    run_job(job(pool, prior, **more), output=str(tmp_path / "out"))
    why = {own: row["why"] for own, row in told(tmp_path / "out").items()}
    assert (why["a/4"], why["a/5"], why["a/6"]) == ("copy of mine.png", "copy of other.png", None)


def test_what_cannot_work_is_said_in_a_sentence(pool: Path, prior: str, tmp_path: Path) -> None:
    for wrong, said in (
        ({"by": "image"}, "by: 'image' holds no classes"),
        ({"keep": ["label"]}, "column 'label' of its own"),
        ({"share": 0}, "share"),
        ({"variety": "random"}, "variety"),
        ({"export": "csv"}, "export"),
        ({"mixture": {"by": "note", "weights": {"x": 0}}}, "mixture.weights"),
    ):
        with pytest.raises(JobFileError, match=said):
            load(job(pool, prior, **wrong))
    for number, (wrong, said) in enumerate((
        ({"by": "concept"}, "concept"),
        ({"score_column": "note"}, "score_column: 'note' holds something else than numbers"),
        ({"against": str(tmp_path)}, "reference"),
    )):  # fmt: skip
        with pytest.raises((ValueError, OSError, RuntimeError), match=said):
            run_job(job(pool, prior, **wrong), output=str(tmp_path / f"{number}"))


def test_kept_pictures_are_the_pool_s_own_bytes(pool: Path, prior: str, tmp_path: Path) -> None:
    run_job(job(pool, prior), output=str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out" / "corpus" / "train.parquet").to_pylist()
    assert len(rows) == 4
    for row in rows:
        number = int(row["id"].removeprefix("a/"))
        assert row["image"]["bytes"] == (pool / f"{number:02d}.png").read_bytes()
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (40, 40)


@pytest.mark.parametrize("layout", ["parquet", "imagefolder", "webdataset"])
def test_a_column_of_bytes_alone_holds_pictures_too(layout: str, pool: Path, prior: str, tmp_path: Path) -> None:
    rows = pq.read_table(pool / "pool.parquet").to_pylist()
    bare = [{**row, "image": row["image"]["bytes"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "pool.parquet")
    for name, source in (("bare", tmp_path), ("typed", pool)):
        told_of = {"path": str(source / "pool.parquet"), "id": "id", "images": ["image"]}
        assert run_job(job(pool, prior, input=told_of, export=layout), output=str(tmp_path / name)).state == "complete"
    assert files(tmp_path / "bare") == files(tmp_path / "typed")


def test_a_table_of_addresses_is_refused_before_any_work(pool: Path, prior: str, tmp_path: Path) -> None:
    """Once it was at the end, when all candidates had been embedded."""
    for given in ({"images": ["image"]}, {}):
        addresses = {"path": str(pool / "addresses.jsonl"), **given}
        with pytest.raises(ValueError, match=r"the column 'image' holds addresses .* give their folder or a Parquet"):
            list(plan_job(load(job(pool, prior, input=addresses)), str(tmp_path / "out")))
    pq.write_table(
        pa.table({"image": [str(pool / "00.png")], "kind": ["ring"], "score": [1.0]}), tmp_path / "one.parquet"
    )
    with pytest.raises(ValueError, match="the column 'image' holds addresses"):
        list(plan_job(load(job(pool, prior, input=str(tmp_path / "one.parquet"))), str(tmp_path / "out")))
