"""Every Python block of the README and the docs runs, and every job file in them is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.dry_run import plan_job
from jobs.run import run_job
from jobs.schema.reading import load
from pipeline.output.export import export
from tests.support import ROOT, tiny_kandinsky, tiny_stable_diffusion
from tests.support.in_process import without_ray
from tests.support.rare import picture
from tests.support.snippets import blocks, run
from tests.test_docs import PAGES

BEFORE = {
    "architecture.md": """
from typing import ClassVar, Literal
from jobs.page import charts
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import Settings, StageSpec
from pipeline.run.driver import Finished
class MySettings(Settings): pass
"""
}
"""What a page has said before its blocks."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the pages speak of, models of random weights at the hub's names."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    without_ray(monkeypatch)
    tiny_stable_diffusion.build("stable-diffusion-v1-5/stable-diffusion-v1-5")
    tiny_kandinsky.build_prior("kandinsky-community/kandinsky-2-2-prior")
    Path("pictures").mkdir()
    for number in range(3):
        picture(number).save(f"pictures/{number}.png")
        Path(f"pictures/{number}.txt").write_text(f"a red star {number}")
    picture(9).save("picture.png")
    Path("prompts.txt").write_text("a red star\n")
    Path("job.yaml").write_text("job: invert-prompts\ninput: prompts.txt\nmethods: [ovi]\n")
    seeds = {"job": "invert-images", "input": "pictures", "methods": ["ddim"], "steps": 2, "size": 128, "prompt": "red"}
    seeds["store_path"] = 2
    run_job({**seeds, "model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "device": "cpu"}, output="out/seeds")
    export("out/seeds", "seeds-tars", "webdataset", ["picture", "latent", "prompt"])
    encoder = "kandinsky-community/kandinsky-2-2-prior"
    source = {"path": "micro-world://train?rows=12&seed=0"}
    run_job({"job": "reference", "input": source, "encoder": encoder, "shrinkage": 0.5}, output="out/reference")
    word = Path("out/concepts/concepts/frozen-in-ice/frozen-in-ice-1")
    word.mkdir(parents=True)
    save_file({"<frozen-in-ice-1>": torch.zeros(1, 32)}, word / "learned_embeds.safetensors")
    return tmp_path


def test_every_python_block_runs(desk: Path) -> None:
    found = []
    for page in PAGES:
        codes = blocks(page.read_text(encoding="utf-8"), "python")
        found += [(BEFORE.get(page.name, "") + code, desk) for code in codes]
    assert len(found) >= 7
    run(found)


def test_every_job_file_is_one(tmp_path: Path) -> None:
    kinds = set()
    for page in PAGES:
        for number, text in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml")):
            if isinstance(yaml.safe_load(text), dict) and "job" in yaml.safe_load(text):
                file = tmp_path / f"{page.stem}-{number}.yaml"
                file.write_text(text)
                kinds.add(load(file, tell=pytest.fail).job)  # no old name of a key
    assert kinds >= {"invert-images", "rare-concepts", "chain"}


def test_the_first_job_of_the_page_on_inversion_can_be_planned(desk: Path) -> None:
    (desk / "job.yaml").write_text(blocks((ROOT / "docs/inversion.md").read_text(), "yaml")[0])
    (planned,) = plan_job(load(desk / "job.yaml"), "out/new")
    assert planned.plan is not None
    assert planned.plan.rows == 3 * 2
    assert not planned.plan.notes
