"""The job `reference` from pictures to search, without a cluster: shards are worked off in this process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from index import gaussian, neighbours
from index.reference import Reference, ReferenceMismatch
from jobs.commands.search import find, write_page
from jobs.run import run_job
from jobs.schema.reading import JobFileError, load
from pipeline import record
from pipeline.output.verify import verify
from pipeline.storage import checksum
from stages.models import clip
from tests.support import ROOT
from tests.support.tiny_kandinsky import build_prior

ROWS = 23


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(ROWS):
        size = (*rng.integers(30, 70, 2), 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")
    (folder / "07.png").write_bytes(b"no picture at all")
    return folder


def _job(pictures: Path, prior: str, **more: object) -> dict[str, object]:
    source = {"path": str(pictures), "format": "images"}
    return {"job": "reference", "input": source, "encoder": prior, "keep": ["text"], "batch_size": 4,
            "shard_rows": 5, **more}  # fmt: skip


@pytest.fixture
def made(in_process: None, pictures: Path, prior: str, tmp_path: Path) -> Path:
    ended = run_job(_job(pictures, prior), output=str(tmp_path / "out"))
    assert (ended.state, ended.ok, ended.failed) == ("complete", ROWS - 1, 1)
    return tmp_path / "out"


def _direct(pictures: Path, prior: str) -> dict[str, np.ndarray]:
    encoder = clip.ImageEncoder(prior)
    names = [path for path in sorted(pictures.glob("*.png")) if path.name != "07.png"]
    z_NE = encoder([Image.open(path).convert("RGB") for path in names], batch=1).numpy()
    return {path.name: z_E for path, z_E in zip(names, z_NE, strict=True)}


def test_a_reference_holds_every_embedding_in_order(made: Path, pictures: Path, prior: str) -> None:
    opened = Reference.open(made, encoder=clip.identity(prior, "image"))
    wanted = _direct(pictures, prior)
    ids = opened.ids(np.arange(opened.rows))
    assert [Path(name).name for name in ids] == list(wanted)
    assert np.allclose(opened.index.vectors_NE, np.stack(list(wanted.values())), atol=1e-5)
    exact = gaussian.fit(gaussian.moments(opened.index.vectors_NE))
    assert torch.allclose(opened.mean, exact.mean_E, atol=1e-12)
    assert torch.allclose(opened.cholesky, exact.cholesky_EE, atol=1e-12)
    assert opened.mean_norm == pytest.approx(float(np.linalg.norm(opened.index.vectors_NE, axis=1).mean()), rel=1e-6)


def test_a_reference_grows_with_its_limit(made: Path, pictures: Path, prior: str, tmp_path: Path) -> None:
    """Index and statistics are those of all rows, as if they had been there from the start."""
    grown = tmp_path / "grown"
    for limit in (3, 9, None):
        ended = run_job(_job(pictures, prior), output=str(grown), limit=limit)
        assert ended.state == "complete"
        assert Reference.open(grown).rows == ended.ok
        assert verify(str(grown)).ok
    at_once, opened = Reference.open(made), Reference.open(grown)
    assert opened.ids(np.arange(opened.rows)).tolist() == at_once.ids(np.arange(at_once.rows)).tolist()
    np.testing.assert_allclose(opened.index.vectors_NE, at_once.index.vectors_NE, atol=1e-5)
    np.testing.assert_allclose(opened.cholesky, at_once.cholesky, atol=1e-5)
    scores, rows = opened.index.search(at_once.index.vectors_NE, 1)
    assert rows[:, 0].tolist() == list(range(at_once.rows))
    assert scores.min() > 0.999


def test_neighbours_are_exact_and_differentiable(made: Path) -> None:
    opened = Reference.open(made)
    z_BE = torch.from_numpy(opened.index.gather(np.array([3, 11]))).requires_grad_()
    found = opened.neighbours(z_BE, 4)
    vectors_NE = torch.from_numpy(np.array(opened.index.vectors_NE))
    cos_BN = torch.nn.functional.cosine_similarity(z_BE[:, None], vectors_NE, dim=-1)
    assert found.positions_BK.tolist() == cos_BN.topk(4).indices.tolist()
    assert torch.allclose(found.cos_BK, cos_BN.topk(4).values)
    assert found.ids[0, 0] == opened.ids(np.array([3]))[0]
    assert torch.equal(found.vectors_BKE, vectors_NE[found.positions_BK])
    (gradient_BE,) = torch.autograd.grad(found.cos_BK[:, 1].sum() + opened.mahalanobis(z_BE).sum(), z_BE)
    assert gradient_BE.abs().sum() > 0


def test_coarse_codes_are_put_in_the_order_of_exact_cosines(pictures: Path, prior: str, tmp_path: Path) -> None:
    job = _job(pictures, prior, index={"factory": "IVF1,SQ4", "recall": 1.0})
    run_job(job, output=str(tmp_path / "out"))
    opened = Reference.open(tmp_path / "out")
    coarse = Reference(opened.path, opened.facts, opened.gaussian, replace(opened.index, surplus=1), "cpu")
    z_BE = torch.randn(8, opened.dim, generator=torch.Generator().manual_seed(1))
    vectors_NE = torch.from_numpy(np.array(opened.index.vectors_NE))
    cos_BN = torch.nn.functional.cosine_similarity(z_BE[:, None], vectors_NE, dim=-1)
    assert (coarse.positions(z_BE, ROWS - 1) != cos_BN.argsort(descending=True).numpy()).any()  # by the codes
    found = coarse.neighbours(z_BE, ROWS - 1)
    assert found.positions_BK.tolist() == cos_BN.argsort(descending=True).tolist()
    assert torch.allclose(found.cos_BK, cos_BN.sort(descending=True).values)
    assert torch.equal(found.vectors_BKE, vectors_NE[found.positions_BK])
    assert (found.ids == opened.ids(found.positions_BK)).all()


def test_another_encoder_is_refused_in_a_sentence(made: Path, tmp_path: Path) -> None:
    other = build_prior(tmp_path / "other", seed=5)
    with pytest.raises(ReferenceMismatch, match="embeddings of different encoders cannot be compared"):
        Reference.open(made, encoder=clip.identity(other, "image"))
    with pytest.raises(FileNotFoundError, match="no finished reference"):
        Reference.open(tmp_path / "nowhere")


def _files(folder: Path) -> dict[str, str]:
    names = ("vectors.npy", "rows.arrow", "index.faiss", "gaussian.safetensors", "reference.json")
    lists = [path.name for path in (folder / "reference").glob("index.ivfdata")]
    contents = {name: (folder / "reference" / name).read_bytes() for name in (*names, *lists)}
    return {name: checksum(io.BytesIO(content)) for name, content in contents.items()}


@pytest.mark.parametrize("name", ["vectors.npy", "index.faiss", "gaussian.safetensors", "reference.json"])
def test_a_file_of_the_reference_that_is_lost_is_told_and_made_again(
    made: Path, pictures: Path, prior: str, name: str
) -> None:
    content = (made / "reference" / name).read_bytes()
    assert verify(str(made)).ok
    (made / "reference" / name).unlink()
    assert verify(str(made)).problems == (f"reference/{name} is gone; run the job again",)
    assert run_job(_job(pictures, prior), output=str(made)).state == "complete"
    assert verify(str(made)).ok
    assert (made / "reference" / name).read_bytes() == content


@pytest.mark.parametrize("place", ["vectors.npy", "part-00001.faiss", "index.merged", "index.faiss"])
def test_a_finish_that_was_interrupted_goes_on(
    made: Path, pictures: Path, prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    again = tmp_path / "again"
    job = _job(pictures, prior, index={"part_rows": 5, "factory": "IVF2,SQ8"})
    whole = tmp_path / "whole"
    run_job(job, output=str(whole))
    real = record.commit

    def commit(draft: Path, path: Path, facts: dict[str, object]) -> dict[str, object]:
        if path.name == place:
            raise KeyboardInterrupt
        return real(draft, path, facts)

    monkeypatch.setattr(record, "commit", commit)
    assert run_job(job, output=str(again)).state == "interrupted"
    assert not (again / "_SUCCESS").exists()
    with pytest.raises(FileNotFoundError):
        Reference.open(again)
    monkeypatch.setattr(record, "commit", real)
    assert run_job(job, output=str(again)).state == "complete"
    assert _files(again) == _files(whole)


KILLED = """
    import json, os, signal, sys
    import faiss
    import pipeline.run.driver
    from jobs.run import run_job
    from tests.support.in_process import _compute_here

    owner, method, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    real = getattr(getattr(faiss, owner), method)
    seen = 0

    def killing(*arguments):
        global seen
        found = real(*arguments)
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(getattr(faiss, owner), method, killing)
    pipeline.run.driver._compute = _compute_here
    run_job(json.loads(sys.argv[4]), output=sys.argv[5])
"""


@pytest.mark.fault
@pytest.mark.parametrize(
    ("owner", "method", "count", "memory"),
    [
        ("IndexIVFScalarQuantizer", "add_with_ids", 3, 1 << 30),  # the third part's vectors are in, but not written
        ("IndexIVFScalarQuantizer", "merge_from", 2, 1 << 30),  # two of the parts are merged
        ("OnDiskInvertedLists", "merge_from_multiple", 1, 1000),  # the lists lie on disk, uncommitted
    ],
    ids=["adding", "merging", "merging on disk"],
)
def test_a_job_killed_while_it_indexes_goes_on_and_ends_with_the_same_bytes(
    pictures: Path, prior: str, tmp_path: Path, owner: str, method: str, count: int, memory: int
) -> None:
    job = _job(pictures, prior, index={"part_rows": 5, "factory": "IVF2,SQ8", "memory": memory})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_job(job, output=str(whole))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), owner, method, str(count), json.dumps(job), str(killed)]
    ended = subprocess.run(command, check=False, timeout=200, cwd=ROOT, capture_output=True)
    assert ended.returncode == -9, ended.stderr.decode()[-2000:]
    assert not (killed / "_SUCCESS").exists()
    with pytest.raises(FileNotFoundError):
        Reference.open(killed)
    parts = killed / "reference" / "parts"
    embedded = {path: path.stat().st_mtime_ns for path in (killed / "_latentmill" / "attempts").iterdir()}
    kept = {path for path in parts.glob("part-*.faiss") if record.record_path(path).exists()}
    assert len(embedded) == 5
    assert (parts / "trained.faiss.json").exists()
    done: list[Path] = []
    real = neighbours._add

    def add(vectors_NE, span, trained, path, facts) -> None:
        done.append(path)
        real(vectors_NE, span, trained, path, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_add", add)
        assert run_job(job, output=str(killed)).state == "complete"
    assert not set(done) & kept  # committed parts are not made again
    assert bool(done) == (method == "add_with_ids")
    assert {path.stat().st_mtime_ns for path in (killed / "data").iterdir()} == set(embedded.values())
    assert _files(killed) == _files(whole)
    assert (memory == 1000) == (killed / "reference" / "index.ivfdata").exists()


def test_embeddings_made_elsewhere_give_the_same_reference(made: Path, prior: str, tmp_path: Path) -> None:
    opened = Reference.open(made)
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "img_emb_0.npy", opened.index.vectors_NE)
    job = {"job": "reference", "input": {"path": str(tmp_path / "emb"), "format": "npy"}, "given": "embeddings",
           "encoder": prior, "shard_rows": 8}  # fmt: skip
    run_job(job, output=str(tmp_path / "adopted"))
    adopted = Reference.open(tmp_path / "adopted", encoder=clip.identity(prior, "image"))
    assert np.array_equal(adopted.index.vectors_NE, opened.index.vectors_NE)
    assert torch.allclose(adopted.cholesky, opened.cholesky, atol=1e-12)
    z_BE = torch.from_numpy(opened.index.gather(np.array([2])))
    assert (adopted.positions(z_BE, 5) == opened.positions(z_BE, 5)).all()


def test_a_parquet_column_without_an_encoder(made: Path, prior: str, tmp_path: Path) -> None:
    job = {"job": "reference", "input": {"path": str(made), "columns": {"embedding": "embedding"}},
           "given": "embeddings", "dim": 24, "max_failed_fraction": 0.5}  # fmt: skip
    ended = run_job(job, output=str(tmp_path / "adopted"))
    assert ended.ok == ROWS - 1
    with pytest.raises(ReferenceMismatch, match="not named"):
        Reference.open(tmp_path / "adopted", encoder=clip.identity(prior, "image"))
    with pytest.raises(ValueError, match="cannot be searched by text"):
        find(str(tmp_path / "adopted"), "a red star", 3)


def test_an_empty_query_is_refused(made: Path) -> None:
    with pytest.raises(ValueError, match="the query is empty"):
        find(str(made), "  ", 3)


def test_search_by_picture_finds_the_picture(made: Path, pictures: Path, tmp_path: Path) -> None:
    found = find(str(made), str(pictures / "12.png"), 3)
    assert Path(found[0].id).name == "12.png"
    assert found[0].cosine == pytest.approx(1, abs=1e-4)
    assert found[0].columns["text"] == "picture number 12"
    assert found[0].picture.size == Image.open(pictures / "12.png").size  # read again from the input
    write_page(tmp_path / "page.html", str(made), "<script>", found)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 3
    assert "<script>" not in page


def test_a_picture_is_searched_for_by_any_usual_name(made: Path, pictures: Path, tmp_path: Path) -> None:
    Image.open(pictures / "12.png").save(tmp_path / "twelve.avif", quality=100)
    assert Path(find(str(made), str(tmp_path / "twelve.avif"), 1)[0].id).name == "12.png"
    with pytest.raises(ValueError, match=r"no_such\.png: No such file"):
        find(str(made), str(tmp_path / "no_such.png"), 1)
    assert len(find(str(made), "a screenshot called star.png", 1)) == 1  # a text that ends as a name does


def test_a_relative_encoder_is_found_from_another_folder(
    pictures: Path, prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(prior).parent)
    run_job(_job(pictures, Path(prior).name), output=str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    assert len(find("out", "picture number 3", 2)) == 2


def test_pictures_of_several_folders_are_found_again(pictures: Path, prior: str, tmp_path: Path) -> None:
    """Paths in a table are relative to its own file, whichever shard its rows fell into."""
    rows = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in (1, 2, 3):
            picture = tmp_path / name / f"{number}.png"
            picture.write_bytes((pictures / f"{number if name == 'a' else number + 10:02d}.png").read_bytes())
            rows[f"{name}{number}"] = Image.open(picture).size
        lines = [json.dumps({"id": f"{name}{number}", "image": f"{number}.png"}) for number in (1, 2, 3)]
        (tmp_path / name / "rows.jsonl").write_text("\n".join(lines))
    source = {"path": [str(tmp_path / name / "rows.jsonl") for name in ("a", "b")], "id": "id", "images": ["image"]}
    run_job({"job": "reference", "input": source, "encoder": prior, "shard_rows": 6}, output=str(tmp_path / "out"))
    found = find(str(tmp_path / "out"), str(tmp_path / "b" / "2.png"), 6)
    assert found[0].id == "b2"
    assert {hit.id: hit.picture and hit.picture.size for hit in found} == rows


def test_search_by_text_is_the_text_encoders_order(made: Path, prior: str) -> None:
    opened = Reference.open(made)
    t_E = clip.TextEncoder(prior)(["picture number 3"])[0].numpy()
    vectors_NE = np.array(opened.index.vectors_NE)
    cos_N = vectors_NE @ t_E / np.linalg.norm(vectors_NE, axis=1) / np.linalg.norm(t_E)
    found = find(str(made), "picture number 3", 5)
    assert [hit.id for hit in found] == opened.ids(np.argsort(-cos_N)[:5]).tolist()


def test_the_app_finds_what_the_encoders_order_says(made: Path, pictures: Path, prior: str, tmp_path: Path) -> None:
    from jobs.view.app import App
    from pipeline.output.dataset import Output

    job = {"job": "reference", "input": {"path": str(made), "columns": {"embedding": "embedding"}},
           "given": "embeddings", "dim": 24, "max_failed_fraction": 0.5}  # fmt: skip
    run_job(job, output=str(tmp_path / "adopted"))
    app = App({"made": Output.open(str(made)), "adopted": Output.open(str(tmp_path / "adopted"))})

    def ids(asked: dict[str, str]) -> list[str]:
        return [row["cells"]["id"] for row in json.loads(app.answer("api/search", asked).body)["rows"]]

    opened = Reference.open(made)
    vectors_NE = np.array(opened.index.vectors_NE)
    unit_NE = vectors_NE / np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    t_E = clip.TextEncoder(prior)(["picture number 3"])[0].numpy()
    count = min(48, ROWS - 1)
    assert ids({"run": "made", "text": "picture number 3"}) == opened.ids(np.argsort(-unit_NE @ t_E)[:count]).tolist()
    rows = json.loads(app.answer("api/rows", {"run": "made"}).body)["rows"]
    twelfth = next(row["at"] for row in rows if row["cells"]["id"].endswith("12.png"))
    order = opened.ids(np.argsort(-unit_NE @ unit_NE[opened.table["id"].to_pylist().index(
        next(row["cells"]["id"] for row in rows if row["at"] == twelfth))])[:count]).tolist()  # fmt: skip
    assert ids({"run": "made", "from": "made", "at": twelfth, "column": "embedding"}) == order
    source = app.answer("source", {"run": "made", "at": twelfth, "size": "192"})
    shown = Image.open(io.BytesIO(source.body)).convert("RGB")
    assert shown.tobytes() == Image.open(pictures / "12.png").convert("RGB").tobytes()
    with pytest.raises(ValueError, match="no text encoder belongs"):
        ids({"run": "adopted", "text": "a star"})
    with pytest.raises(ValueError, match="no embeddings by the encoder of adopted"):
        ids({"run": "adopted", "from": "made", "at": twelfth, "column": "embedding"})
    app.close()


def test_the_search_command(made: Path, pictures: Path, tmp_path: Path) -> None:
    from jobs.commands.cli import app

    command = ["search", str(made), str(pictures / "02.png"), "-k", "2"]
    shown = CliRunner().invoke(app, [*command, "--page", str(tmp_path / "p.html")])
    assert shown.exit_code == 0, shown.output
    assert "picture number 2" in shown.output
    assert (tmp_path / "p.html").exists()
    listed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert len(listed) == 2
    assert listed[0]["text"] == "picture number 2"
    wrong = CliRunner().invoke(app, ["search", str(tmp_path), "x"])
    assert wrong.exit_code == 2


def test_the_report_shows_the_reference(made: Path) -> None:
    page = (made / "report.html").read_text()
    for words in ("Reference", "measured recall", "Spread", "effective dimension", "Neighbours"):
        assert words in page


def test_exact_search_on_the_device_agrees(made: Path) -> None:
    opened = Reference.open(made)
    resident = Reference(opened.path, opened.facts, opened.gaussian, opened.index, "cpu")
    unit_NE = torch.from_numpy(neighbours.unit(opened.index.vectors_NE))
    resident.__dict__["_resident"] = unit_NE
    z_BE = torch.randn(6, opened.dim, generator=torch.Generator().manual_seed(0))
    assert (resident.positions(z_BE, 4) == opened.positions(z_BE, 4)).all()


def test_vectors_rounded_on_the_device_are_ranked_exactly(made: Path) -> None:
    """Rows whose cosines differ by less than float16 can tell are in the order of float64."""
    opened = Reference.open(made)
    rng = np.random.default_rng(0)
    base_E = rng.normal(size=opened.dim)
    vectors_NE = (base_E + 1e-3 * rng.normal(size=(300, opened.dim))).astype(np.float32)
    facts = {**opened.facts, "rows": 300}
    resident = Reference(opened.path, facts, opened.gaussian, replace(opened.index, vectors_NE=vectors_NE), "cpu")
    unit_NE = torch.from_numpy(neighbours.unit(vectors_NE)).half()
    resident.__dict__["_resident"] = unit_NE
    z_BE = torch.from_numpy(base_E + 0.3 * rng.normal(size=(5, opened.dim)))
    exact_NE = torch.from_numpy(vectors_NE).double()
    cos_BN = torch.nn.functional.cosine_similarity(z_BE[:, None], exact_NE, dim=-1)
    rounded = (torch.nn.functional.normalize(z_BE, dim=-1).half() @ unit_NE.mT).topk(20).indices.numpy()
    lost = cos_BN.topk(20).values - cos_BN.gather(1, torch.from_numpy(rounded))
    assert lost.max() > 1e-5  # what float16 alone would find
    found = torch.from_numpy(resident.positions(z_BE, 20))
    assert (cos_BN.gather(1, found) - cos_BN.topk(20).values).abs().max() < 2e-7


def test_the_index_is_tuned_on_the_texts_that_will_search_it(
    pictures: Path, prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = clip.TextEncoder.__call__

    def spied(self: clip.TextEncoder, prompts: list[str], batch: int = 256) -> torch.Tensor:
        asked.append(list(prompts))
        return real(self, prompts, batch)

    monkeypatch.setattr(clip.TextEncoder, "__call__", spied)
    job = _job(pictures, prior, index={"factory": "IVF4,Flat"})
    run_job(job, output=str(tmp_path / "captioned"))
    assert sorted(asked[0]) == sorted(f"picture number {n}" for n in range(ROWS))
    made = Reference.open(tmp_path / "captioned").facts["index"]
    assert made["text_queries"] == ROWS
    assert made["text_recall"]["10"] >= 0.95
    assert made["recall"]["10"] >= 0.95
    assert "measured recall of texts" in (tmp_path / "captioned/report.html").read_text()
    run_job({**job, "keep": []}, output=str(tmp_path / "plain"))
    assert {text.rpartition(" ")[0] for text in asked[1]} == {"a photo of a"}
    assert "a photo of a star" in asked[1]
    run_job({**_job(pictures, prior)}, output=str(tmp_path / "exact"))  # searched exactly: nothing to tune
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "encoder"),
        ({"given": "embeddings"}, "dim"),
        ({"encoder": "x", "dim": 3}, "belongs to"),
        ({"encoder": "x", "shrinkage": 2.0}, "between 0 and 1"),
        ({"encoder": "x", "index": {"recal": 0.9}}, "recall"),
    ],
)
def test_job_files_that_cannot_work_are_refused(more: dict[str, object], said: str) -> None:
    with pytest.raises(JobFileError, match=said):
        load({"job": "reference", "input": "x.parquet", **more})


def test_the_shipped_job_file_is_valid() -> None:
    assert load(ROOT / "jobs" / "examples" / "reference.yaml").job == "reference"
