"""The job `reference` with captions: text embeddings and joint statistics beside those of the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import Ridge

from index import joint
from index.reference import Reference
from jobs.run import run_job
from jobs.schema.reading import JobFileError
from pipeline.input.source import SourceError
from pipeline.output.verify import verify
from stages.embed.captions import CaptionError, read_captions
from stages.models import clip
from tests.support.rare import picture

ROWS, SILENT = 26, (3, 11)
"""Pictures, and those of them that have no caption."""


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(ROWS):
        picture(number).save(folder / f"{number:02d}.png")
        if number not in SILENT:
            (folder / f"{number:02d}.txt").write_text(_caption(number))
    return folder


def _caption(number: int) -> str:
    return f"a {'red' if number % 2 else 'blue'} star number {number}"


def _job(pictures: Path, prior: str, **more: Any) -> dict[str, Any]:
    source = {"path": str(pictures), "format": "images"}
    return {"job": "reference", "input": source, "encoder": prior, "batch_size": 4, "shard_rows": 5, **more}


def _opened(output: str | Path) -> Reference:
    opened = Reference.open(output)
    assert opened.captions is not None
    return opened


def test_captions_are_embedded_counted_and_kept_beside_their_pictures(
    pictures: Path, prior: str, tmp_path: Path
) -> None:
    run_job(_job(pictures, prior), output=str(tmp_path / "plain"))
    ended = run_job(_job(pictures, prior, captions=True), output=str(tmp_path / "out"))
    assert (ended.state, ended.ok, ended.failed) == ("complete", ROWS, 0)
    opened, plain = _opened(tmp_path / "out"), Reference.open(tmp_path / "plain")
    assert plain.captions is None
    assert np.array_equal(opened.index.vectors_NE, plain.index.vectors_NE)
    assert (opened.gaussian.covariance_EE == plain.gaussian.covariance_EE).all()  # of all pictures, captioned or not
    held = [number for number in range(ROWS) if number not in SILENT]
    captions = opened.captions
    assert captions.rows_M.tolist() == held
    texts_MT = clip.TextEncoder(prior)([_caption(number) for number in held]).numpy()
    assert np.allclose(captions.index.vectors_NE, texts_MT, atol=1e-5)
    both_MJ = np.concatenate([captions.index.vectors_NE, opened.index.vectors_NE[held]], 1).astype(np.float64)
    exact_JJ = np.cov(both_MJ.T)
    assert np.abs(captions.pairs.moments.covariance() - exact_JJ).max() < 1e-12 * np.abs(exact_JJ).max()
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in np.split(both_MJ, 2, axis=1)]
    told = opened.facts["captions"]
    assert told["captioned"] == len(held)
    assert told["modality_gap"] == pytest.approx(np.linalg.norm(units[0].mean(0) - units[1].mean(0)), rel=1e-12)
    assert told["matched_cosine"] == pytest.approx((units[0] * units[1]).sum(1).mean(), rel=1e-12)
    assert "24 rows, 2 have none; modality gap" in (tmp_path / "out/report.html").read_text()
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["text_embedding"] is None for row in rows] == [number in SILENT for number in range(ROWS)]
    assert [row["prompt_tokens"] is None for row in rows] == [number in SILENT for number in range(ROWS)]
    query = opened.captions.index.search(texts_MT[4:5] * 3, 1)[1]
    assert query.tolist() == [[4]]


def test_the_index_is_tuned_on_the_captions(pictures: Path, prior: str, tmp_path: Path) -> None:
    job = _job(pictures, prior, captions=True, index={"factory": "IVF4,Flat"})
    run_job(job, output=str(tmp_path / "out"))
    opened = _opened(tmp_path / "out")
    made = opened.facts["index"]
    assert made["text_queries"] == ROWS - len(SILENT)
    both = opened.captions.index.vectors_NE, opened.index.vectors_NE
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in both]
    exact = np.argsort(-(unit[0] @ unit[1].T), axis=1)[:, :10]
    found = opened.index.search(unit[0], 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    assert made["text_recall"]["10"] == pytest.approx(recall, abs=1e-5)
    assert recall >= 0.95


def test_captions_of_a_second_file_for_embeddings_made_before(pictures: Path, prior: str, tmp_path: Path) -> None:
    run_job(_job(pictures, prior), output=str(tmp_path / "plain"))
    ids = pq.read_table(tmp_path / "plain" / "data")["id"].to_pylist()
    lines = [{"file": own, "said": _caption(n)} for n, own in enumerate(ids) if n not in SILENT][::-1]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = {"job": "reference", "input": {"path": str(tmp_path / "plain")}, "given": "embeddings", "encoder": prior,
             "captions": {"path": str(tmp_path / "said.jsonl"), "id": "file", "prompt": "said"}}  # fmt: skip
    run_job(again, output=str(tmp_path / "out"))
    run_job(_job(pictures, prior, captions=True), output=str(tmp_path / "whole"))
    opened, whole = _opened(tmp_path / "out"), _opened(tmp_path / "whole")
    own_MT, texts_MT = opened.captions.index.vectors_NE, whole.captions.index.vectors_NE
    assert np.abs(own_MT - texts_MT).max() < 1e-5 * np.abs(texts_MT).max()  # captions come in batches of another size
    assert np.array_equal(opened.captions.rows_M, whole.captions.rows_M)
    found, wanted = opened.captions.pairs.moments, whole.captions.pairs.moments
    assert np.abs(found.scatter_EE - wanted.scatter_EE).max() < 1e-5 * np.abs(wanted.scatter_EE).max()
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert rows[0]["prompt"] == _caption(0)
    assert rows[SILENT[0]]["prompt"] is None


def test_prompts_are_inverted_by_what_the_dataset_says(pictures: Path, prior: str, tmp_path: Path) -> None:
    """`linear` through both jobs is scikit-learn's ridge on the two columns of the reference's dataset."""
    run_job(_job(pictures, prior, captions=True), output=str(tmp_path / "reference"))
    rows = pq.read_table(tmp_path / "reference" / "data").to_pylist()
    both = [(row["text_embedding"], row["embedding"]) for row in rows if row["text_embedding"] is not None]
    t, z = (np.array(column, np.float64) for column in zip(*both, strict=True))
    prompts = ["a red star number 7", "a blue circle", "photo of a heart"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    methods = [{"method": "linear", "ridge": 0.3}, {"method": "retrieval", "nearest_by": "caption", "name": "said"},
               {"method": "linear", "name": "typical", "residual": 0.5}, "kernel", "mean-shift"]  # fmt: skip
    job = {"job": "invert-prompts", "input": str(tmp_path / "prompts.txt"), "encoder": prior, "methods": methods,
           "reference": str(tmp_path / "reference")}  # fmt: skip
    ended = run_job(job, output=str(tmp_path / "out"))
    assert (ended.state, ended.ok, ended.failed) == ("complete", 15, 0)
    made = pq.read_table(tmp_path / "out" / "data").to_pylist()
    found = np.array([row["embedding"] for row in made if row["method"] == "linear"], np.float64)
    alpha = (len(t) - 1) * 0.3 * np.trace(np.cov(t.T)) / t.shape[1]
    wanted = Ridge(alpha=alpha).fit(t, z).predict(clip.TextEncoder(prior)(prompts).double().numpy())
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    said = [row["embedding"] for row in made if row["method"] == "said"]
    assert all(any(np.allclose(one, z_E, atol=1e-6) for z_E in z) for one in said)
    plain = {
        **_job(pictures, prior),
        "input": {"path": str(pictures), "format": "images", "columns": {"image": "image"}},
    }
    run_job(plain, output=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"method 'linear' needs captions, and the reference .*plain has none"):
        run_job({**job, "reference": str(tmp_path / "plain")}, output=str(tmp_path / "none"))


def test_a_lost_file_of_the_captions_is_made_again_and_a_store_serves_them(
    pictures: Path, prior: str, tmp_path: Path
) -> None:
    job = _job(pictures, prior, captions=True)
    run_job(job, output=str(tmp_path / "out"))
    lost = tmp_path / "out/reference/captions/vectors.npy"
    content = lost.read_bytes()
    lost.unlink()
    assert verify(str(tmp_path / "out")).problems == ("reference/captions/vectors.npy is gone; run the job again",)
    assert run_job(job, output=str(tmp_path / "out")).state == "complete"
    assert lost.read_bytes() == content
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "out/reference"), "/captioned/reference", recursive=True)
    assert np.array_equal(_opened("memory://captioned").captions.rows_M, np.load(lost.with_name("rows.npy")))


def test_a_file_of_captions_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    file = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "c"], "prompt": ["one", None, " "]}), file)
    assert read_captions(str(file), "id", "prompt") == {"a": "one"}
    with pytest.raises(CaptionError, match="has no column 'caption'; it has id, prompt"):
        read_captions(str(file), "id", "caption")
    pq.write_table(pa.table({"id": [1, 1], "prompt": ["one", "two"]}), file)
    with pytest.raises(CaptionError, match="two captions for the id '1'"):
        read_captions(str(file), "id", "prompt")
    (tmp_path / "said.csv").write_text("id,prompt\n007,12\n8,\n")
    assert read_captions(str(tmp_path / "said.csv"), "id", "prompt") == {"007": "12"}
    with pytest.raises(CaptionError, match="ends in none of"):
        read_captions("captions.xlsx", "id", "prompt")
    with pytest.raises(CaptionError, match="cannot be read"):
        read_captions(str(tmp_path / "none.csv"), "id", "prompt")


def test_a_job_that_finds_no_captions_says_so_before_it_embeds(prior: str, tmp_path: Path) -> None:
    source = {"path": "micro-world://train?rows=12&seed=0", "columns": {"image": "image"}}
    job = {"job": "reference", "input": source, "encoder": prior, "captions": True}
    with pytest.raises(
        (JobFileError, SourceError),
        match="reads texts from prompt or text or caption; there is no such column, but image",
    ):
        run_job(job, output=str(tmp_path / "out"))
    given = {"job": "reference", "input": "x.npy", "given": "embeddings", "dim": 4, "captions": True}
    with pytest.raises(ValueError, match="no encoder is named; name one with `text_encoder`"):
        run_job(given, output=str(tmp_path / "out"))


def test_captions_of_other_rows_are_told(pictures: Path, prior: str, tmp_path: Path) -> None:
    (tmp_path / "said.csv").write_text("id,prompt\nnobody,a red star\n")
    run_job(_job(pictures, prior, captions=str(tmp_path / "said.csv")), output=str(tmp_path / "out"))
    opened = Reference.open(tmp_path / "out")
    assert (opened.captions, opened.facts["captions"]["captioned"]) == (None, 0)
    assert "asked for, but no row has one" in (tmp_path / "out/report.html").read_text()


def test_texts_of_another_encoder_have_their_own_width(pictures: Path, prior: str, tmp_path: Path) -> None:
    """Embeddings of any encoder, captions by any other: the statistics ask for no common space."""
    rng = np.random.default_rng(0)
    ids = [f"{number}" for number in range(20)]
    rows = {"id": ids, "embedding": rng.normal(size=(20, 7)).tolist(), "caption": [_caption(n) for n in range(20)]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    job = {"job": "reference", "input": {"path": str(tmp_path / "rows.parquet"), "id": "id"}, "given": "embeddings",
           "dim": 7, "text_encoder": prior, "captions": True}  # fmt: skip
    run_job(job, output=str(tmp_path / "out"))
    opened = _opened(tmp_path / "out")
    assert (opened.captions.pairs.texts, opened.captions.pairs.images) == (24, 7)
    assert opened.facts["captions"]["modality_gap"] is None
    assert isinstance(opened.captions.fit, joint.Fit)
