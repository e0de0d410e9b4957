"""The job rare-concepts: its files, and a chain from pictures to a corpus."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from jobs.kinds.rare_concepts import RareConcepts as Job
from jobs.run import run_job
from pipeline.input.source import SourceError
from stages.rare.references import read_concept_row
from tests.support import tiny_kandinsky, tiny_stable_diffusion
from tests.support.rare import method, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_stable_diffusion.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_kandinsky.build_prior(tmp_path_factory.mktemp("clip"))


def test_job_file_errors_name_the_key() -> None:
    for wrong, said in (
        ({"methods": ["nao", "nao"]}, "two are called 'nao'"),
        ({"methods": ["nao"], "inversion": "edict"}, "inversion: edict needs more than a seed"),
        ({"methods": ["nao"], "inversion": {"method": "lbo", "replay": True}}, "needs more than a seed"),
        ({"methods": [{"method": "slerp", "margin": 0.5}]}, "margin"),
        ({"methods": ["nao"], "score": []}, "score"),
        ({"methods": [{"method": "slerp", "name": "a/b"}]}, "slash"),
    ):
        with pytest.raises(ValidationError, match=said):
            Job.model_validate({"input": "x", **wrong})
    assert method("seed-select").budget == (30, 0.1)  # type: ignore[attr-defined]
    assert method("seed-select", start="nao").budget == (5, 0.05)  # type: ignore[attr-defined]


def test_shipped_job_files_are_valid_and_plan_a_row_for_each_concept_method_and_number() -> None:
    from jobs.schema.reading import load
    from pipeline.input.files import list_files, resolve
    from pipeline.input.read import reader_of
    from pipeline.input.rows import Span

    real = load("jobs/examples/rare-concepts-sd15.yaml")
    assert isinstance(real, Job)
    assert real.shard_rows == real.count * len(real.methods)
    job = load("jobs/examples/rare-concepts-micro.yaml")
    assert isinstance(job, Job)
    source = resolve(job.source())
    ids = []
    for file in list_files(source):
        scan = reader_of(source).scan(source, file, lambda row: False)
        for raw in reader_of(source).rows(source, Span(file.name, file.path, 0, scan.rows), None):
            ids.append(raw.id)
            asked = read_concept_row("key", {"id": raw.id, **raw.values}, 16)
            assert len(asked.pictures) == 4
            assert raw.values["objects"][0]["shape"] in asked.prompt
    assert len(set(ids)) == len(ids) == 4 * len(job.methods) * job.count
    assert "checkered-pink-star/nao-select/3" in ids


@pytest.mark.slow
def test_a_chain_from_pictures_to_a_corpus_regenerates_by_the_documented_lines(
    folder: str, clip: str, tmp_path: Path, monkeypatch
) -> None:
    from jobs.run import run_job

    (tmp_path / "pictures").mkdir()
    listing = []
    for number in range(6):
        picture(number).save(tmp_path / "pictures" / f"{number}.png")
        concept = ("star", "ring")[number % 2]
        listing.append({"image": f"pictures/{number}.png", "concept": concept, "prompt": f"a red {concept}"})
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listing))
    table = [{"name": name, "prompt": f"a red {name}"} for name in ("star", "ring", "moon")]
    (tmp_path / "concepts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    result = run_job(
        {
            "job": "chain",
            "output": str(tmp_path / "out"),
            "steps": [
                {
                    "name": "seeds", "job": "invert-images", "model": folder, "steps": 10, "device": "cpu",
                    "input": {"path": str(tmp_path / "pictures.jsonl"), "images": ["image"]}, "keep": ["concept"],
                    "methods": [{"method": "lbo"}],
                },
                {
                    "name": "corpus", "job": "rare-concepts", "model": folder, "encoder": clip, "steps": 10,
                    "guidance": 2,
                    "input": {"path": str(tmp_path / "concepts.jsonl"), "id": "name"}, "seeds": "${seeds}",
                    "methods": ["slerp", {"method": "seed-select", "start": "linear", "iterations": 1, "steps": 3}],
                    "count": 3, "candidates": 2, "slots": 4, "shard_rows": 5, "device": "cpu", "store": "float16",
                    "max_failed_fraction": 0.5,
                },
            ],
        }
    )  # fmt: skip
    assert (result.state, result.ok, result.failed) == ("complete", 6 + 12, 6)
    out = tmp_path / "out" / "corpus"
    stored = [row for part in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    wanted = [f"{c}/{m}/{n}" for c in ("star", "ring", "moon") for m in ("slerp", "seed-select") for n in range(3)]
    assert [row["id"] for row in stored] == wanted
    assert all("no inverted row with concept 'moon'" in row["error"] for row in stored if row["id"][:4] == "moon")
    for row in stored[:12]:
        kept = {parent["id"] for parent in json.loads(row["parents"])}
        assert kept <= {f"pictures.jsonl#{i}/lbo" for i in ((0, 2, 4) if row["concept"] == "star" else (1, 3, 5))}
    (lines,) = re.findall(r"back to its picture\n\n```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for index in (0, 4, 11):
        exec(re.sub(r"row = next\(.*\)", f"row = rows[{index}]", lines), {})
        again = np.asarray(Image.open("again.png")).astype(int)
        kept = np.asarray(Image.open(io.BytesIO(stored[index]["image"]["bytes"]))).astype(int)
        assert np.abs(again - kept).max() <= 2
    report = (out / "report.html").read_text()
    assert "Methods of new seeds" in report
    assert "its pictures" in report
    assert "a panel" not in report


@pytest.mark.parametrize("name", ["benchmarks/prompts/rare.jsonl", "jobs/examples/rare-guides-micro.jsonl"])
def test_shipped_prompts_hold_what_every_guide_needs(name: str) -> None:
    from micro import world
    from stages.rare.guides import lacks, read_texts
    from stages.rare.settings import AapbGuide, ComposeGuide, R2fGuide

    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert len({row["name"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        texts = read_texts(row["name"], row)
        assert [lacks(guide, texts) for guide in (R2fGuide(), AapbGuide(), ComposeGuide())] == [None] * 3
        for text in [row["anchor"], *(t for part in texts.parts for t in part if "objects" in row)]:
            words = text.split()[1:]
            if "objects" in row:  # of the miniature world: an anchor is what its pictures hold often
                texture = words[0] if words[0] in world.TEXTURES else "plain"
                assert world.rarity(words[-1], words[-2], texture) == "frequent", text
                assert world.rarity(*row["objects"][0].values()) != "frequent"


def test_a_guide_makes_rows_of_its_own_and_none_leaves_ids_as_they_were() -> None:
    job = Job.model_validate({"input": "x.jsonl", "methods": ["random"], "guides": ["plain", "aapb"], "count": 2})
    assert job.source().variants == {"method": ("random",), "guide": ("plain", "aapb"), "number": ("0", "1")}
    assert "guide" not in Job.model_validate({"input": "x.jsonl", "methods": ["random"]}).source().variants
    for wrong, said in (
        ({"guides": ["plain", "plain"]}, "two are called 'plain'"),
        ({"guides": [{"method": "aapb", "g": 2}]}, "g"),
        ({"guides": []}, "guides"),
        ({"methods": [{"method": "random", "blend": {"low": 0.2}}]}, "blend"),
        ({"methods": [{"method": "nao", "blend": {"low": 1}}]}, "low"),
    ):
        with pytest.raises(ValidationError, match=said):
            Job.model_validate({"input": "x", "methods": ["nao"], **wrong})


def test_what_no_concept_of_the_input_has_is_told_before_anything_is_drawn(
    folder: str, clip: str, tmp_path: Path
) -> None:
    """Before: every row failed, each for itself, after the models were loaded."""
    table = tmp_path / "concepts.jsonl"
    table.write_text(json.dumps({"name": "a", "prompt": "a red moon"}) + "\n")
    job = {"job": "rare-concepts", "input": {"path": str(table), "id": "name"}, "model": folder, "encoder": clip,
           "steps": 4, "score": ["text"]}  # fmt: skip
    for more, said in (
        ({"methods": ["random"], "guides": ["plain", "aapb"]}, "aapb draws by a text near the prompt.* 'anchor'"),
        ({"methods": ["random"], "guides": ["compose"]}, "compose draws by a list of texts.* no column 'parts'"),
        ({"methods": ["random", "slerp"]}, "slerp starts from a concept's pictures.* 'pictures' or 'with'"),
        ({"methods": ["random"], "score": ["image"]}, "the score 'image' needs a concept's pictures"),
    ):
        with pytest.raises(SourceError, match=said):
            run_job({**job, **more}, output=str(tmp_path / "out"))
