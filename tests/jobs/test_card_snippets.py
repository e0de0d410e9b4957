"""The Python in the cards of finished datasets runs as it stands, without this project unless it imports it itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.run import run_job
from stages.models.families import read_geometry
from stages.models.settings import LatentModelSettings
from tests.support import tiny_kandinsky, tiny_stable_diffusion
from tests.support.looked_through import lines_of, look_through
from tests.support.rare import picture
from tests.support.snippets import blocks, needs_us, run

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "sd": tiny_stable_diffusion.build(root / "sd"),
        "sdxl": tiny_stable_diffusion.build(root / "sdxl", "sdxl"),
        "prior": tiny_kandinsky.build_prior(root / "prior"),
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures (the first one is none), prompts, a concept to learn and a rare one."""
    root = tmp_path_factory.mktemp("inputs")
    for number in range(4):
        for place in ("pictures", "concepts/dotted/with", "concepts/dotted/without"):
            (root / place).mkdir(parents=True, exist_ok=True)
            picture(number).save(root / place / f"{number}.png")
        (root / f"pictures/{number}.txt").write_text(f"a red star {number}")
    (root / "pictures/0.png").write_bytes(b"no picture")
    (root / "concepts/dotted/concept.yaml").write_text(yaml.safe_dump({"concept": "dotted", "subject": "circle"}))
    prompts = [{"prompt": f"a {colour} {shape}"} for colour in ("red", "blue") for shape in ("star", "ring", "heart")]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    pictures = [str(root / f"pictures/{number}.png") for number in (1, 2, 3)]
    concept = {"name": "star", "prompt": "a red star", "pictures": pictures}
    (root / "rare.jsonl").write_text(json.dumps(concept) + "\n")
    return root


Made = Callable[..., Path]


@pytest.fixture
def made(inputs: Path, tmp_path: Path) -> Made:
    """Runs a job and says where its dataset is."""

    def make(job: Mapping[str, Any], output: str = "out") -> Path:
        ended = run_job({"max_failed_fraction": 1.0, **job}, output=str(tmp_path / output))
        assert ended.state == "complete"
        assert ended.ok >= 1, ended.errors
        look_through(tmp_path / output)
        return tmp_path / output

    return make


def snippets(output: Path) -> list[tuple[str, Path]]:
    return [(code, output.parent) for code in blocks((output / "README.md").read_text(), "python")]


def pictures_job(models: Mapping[str, str], inputs: Path, kind: str, **more: Any) -> dict[str, Any]:
    source = {"path": str(inputs / "pictures"), "format": "images", "columns": {"prompt": "text", "image": "image"}}
    return {"job": "invert-images", "input": source, "model": models[kind], "device": "cpu", "steps": 4, **more}


def test_seeds_of_pictures(models: dict[str, str], inputs: Path, made: Made) -> None:
    """The first row that serves is shown, not the first: that one failed, and `edict` stores more than a seed."""
    methods = ["edict", {"method": "lbo", "name": "mine"}]
    outs = [made(pictures_job(models, inputs, kind, methods=methods), f"{kind}/out") for kind in ("sd", "sdxl")]
    codes = [snippet for out in outs for snippet in snippets(out)]
    assert [needs_us(code) for code, _ in codes] == [False] * 4
    asked = [lines_of(out, "3.png/mine") for out in outs]
    codes += [
        (one["Its picture again"].replace("again.png", "third.png"), out.parent)
        for one, out in zip(asked, outs, strict=True)
    ]
    run(codes)
    from datasets import load_dataset

    for out in outs:
        assert "Its picture again" not in {**lines_of(out, "3.png/edict"), **lines_of(out, "0.png/mine")}
        rows = load_dataset(str(out), split="train", cache_dir=str(out / "cache"))
        first = next(row for row in rows if row["status"] == "ok" and row["method"] == "mine")
        third = next(row for row in rows if row["id"].endswith("3.png/mine"))
        for name, row in (("again.png", first), ("third.png", third)):
            again, kept = (np.asarray(p).astype(int) for p in (Image.open(out.parent / name), row["reconstruction"]))
            assert np.abs(again - kept).max() <= 2


def test_a_dataset_at_an_address_is_read_from_there(models: dict[str, str], inputs: Path, tmp_path: Path) -> None:
    job = pictures_job(models, inputs, "sd", methods=["ddim"], max_failed_fraction=1.0)
    assert run_job(job, output=f"file://{tmp_path}/out").state == "complete"
    codes = snippets(tmp_path / "out")
    assert all(f'data_files="file://{tmp_path}/out/data/part-*.parquet"' in code for code, _ in codes)
    run(codes)


def test_seeds_that_are_no_seeds_alone_get_no_lines(models: dict[str, str], inputs: Path, made: Made) -> None:
    out = made(pictures_job(models, inputs, "sd", methods=["edict"]))
    text = (out / "README.md").read_text()
    assert "store more than a seed" in text
    assert "latents=seed" not in text


def test_learned_words(models: dict[str, str], inputs: Path, made: Made) -> None:
    """Also for the shipped model, whose text encoder is stored in float16 while its U-Net loads as float32."""
    learning = {"steps": 1, "window": 1, "context": "none"}
    job = {"job": "learn-concepts", "input": str(inputs / "concepts"), "device": "cpu", "learning": learning}
    chosen = {"sd": models["sd"], "sdxl": models["sdxl"], "shipped": "micro:stable-diffusion"}
    outs = [made({**job, "model": model}, f"{kind}/out") for kind, model in chosen.items()]
    for out in outs:
        text = (out / "README.md").read_text()
        assert f"{out}/concepts/dotted/dotted-1/learned_embeds.safetensors" in text
        assert "frozen-in-ice" not in text
    for kind, out in zip(chosen, outs, strict=True):
        words = read_geometry(LatentModelSettings(model=chosen[kind], words=(str(out),))).words
        assert {word.token for word in words} == {"<dotted-1>", "<dotted-subject-1>"}
        assert len(words) == (4 if kind == "sdxl" else 2)
    with pytest.raises(ValueError, match="of another model"):
        read_geometry(LatentModelSettings(model=chosen["shipped"], words=(str(outs[0]),)))
    run([snippet for out in outs for snippet in snippets(out)])
    assert [Image.open(out.parent / "concept.png").size for out in outs] == [(16, 16), (16, 16), (64, 64)]


def test_an_inverter_and_what_it_reads(models: dict[str, str], inputs: Path, made: Made) -> None:
    plain = {"model": models["sd"], "device": "cpu"}
    job = {"job": "train-inverter", "input": str(inputs / "prompts.jsonl"), "steps": 2, **plain}
    network = {"patch": 4, "width": 16, "layers": 1, "heads": 2}
    trained = made({**job, "network": network, "training": {"steps": 1, "batch_size": 1}}, "inverter")
    inverted = made(pictures_job(models, inputs, "sd", methods=["ddim"], inverter=str(trained)), "seeds")
    read = {"job": "invert-text", "inverter": str(trained), **plain}
    texts = made({**read, "input": {"path": str(inputs / "pictures"), "format": "images"}}, "texts")
    run([*snippets(trained), *snippets(inverted), *snippets(texts)])


def test_rare_concepts(models: dict[str, str], inputs: Path, made: Made) -> None:
    job = {"job": "rare-concepts", "input": {"path": str(inputs / "rare.jsonl"), "id": "name"}, "steps": 4, "count": 1}
    out = made({**job, "model": models["sd"], "encoder": models["prior"], "methods": ["slerp"], "device": "cpu"})
    run(snippets(out))


def test_a_reference_and_prompts(models: dict[str, str], inputs: Path, made: Made) -> None:
    source = {"path": str(inputs / "pictures"), "format": "images"}
    reference = made({"job": "reference", "input": source, "encoder": models["prior"], "shrinkage": 0.5}, "reference")
    job = {"job": "invert-prompts", "input": str(inputs / "prompts.jsonl"), "encoder": models["prior"]}
    prompts = made({**job, "methods": ["text-embedding"]}, "prompts")
    run([*snippets(reference), *snippets(prompts)])
