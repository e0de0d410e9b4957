"""Configurations are read as diffusers reads them, without the classes that diffusers reads them with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import micro
from stages.models.files import INDEX, SCHEDULER, read_config
from stages.models.transformer import WithDefaults
from tests.support import ROOT

CHAIN = """
job: chain
steps:
  - {name: reference, job: reference, input: {path: "micro-world://train?rows=3&seed=0"}, encoder: micro:prior}
  - {name: prompts, job: invert-prompts, input: {path: PROMPTS}, encoder: micro:prior, methods: [text-embedding],
     decode: {model: micro:decoder}}
  - {name: flow, job: invert-images, input: {path: PICTURES, images: [image]}, model: micro:flux, size: 128,
     methods: [euler]}
  - {name: unet, job: invert-images, input: {path: PICTURES, images: [image]}, model: micro:stable-diffusion,
     methods: [ddim]}
"""
LATE = {"ray", "peft", "torchvision", "transformers.modeling_utils", "diffusers.models.attention_processor"}
"""What networks, or workers, need; the first four of them take as long as all of planning."""


def test_what_diffusers_reads_of_every_shipped_folder() -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

    read = 0
    for index in sorted(Path(micro.__file__).parent.glob(f"models/*/{INDEX}")):
        model = str(index.parent)
        assert read_config(model, INDEX) == DiffusionPipeline.load_config(model)
        for config in index.parent.glob("*/*config.json"):
            kind: Any = {"config.json": UNet2DConditionModel, SCHEDULER: DDIMScheduler}.get(config.name)
            if kind is not None:
                part, read = config.parent.name, read + 1
                assert read_config(model, config.name, folder=part) == kind.load_config(model, subfolder=part)
    assert read > 20


def test_what_a_folder_leaves_out_is_the_default_of_the_network_itself() -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    from stages.models.names import shipped

    whole = read_config(shipped("micro:flux"), folder="transformer")
    left = {key: value for key, value in whole.items() if key not in ("guidance_embeds", "in_channels", "patch_size")}
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(left)
    told = WithDefaults(left, "FluxTransformer2DModel")
    assert {key: told[key] for key in network.config if key[0] != "_"} == {
        key: list(value) if isinstance(value, list) else value for key, value in network.config.items() if key[0] != "_"
    }
    assert "no such parameter" not in told


@pytest.mark.parametrize("content", [None, "{", "\x00"])
def test_no_configuration_is_told_in_a_line(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "unet").mkdir()
    if content is not None:
        (tmp_path / "unet/config.json").write_text(content)
    (tmp_path / "config.json").write_text("{}")  # of something else: no part takes it for its own
    with pytest.raises(OSError, match=r"no config\.json in .*/unet|unet/config\.json is no JSON: Expecting") as told:
        read_config(str(tmp_path), folder="unet")
    assert "\n" not in str(told.value)


def test_neither_a_folder_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("{}")
    for name in (str(tmp_path / "file"), str(tmp_path / "nothing"), "nobody/has-this", "no/hub/id"):
        with pytest.raises(OSError, match=r"no folder, and (so none with a|no) ") as told:
            read_config(name)
        assert name in str(told.value)
        assert "\n" not in str(told.value)


def test_planning_imports_no_networks(tmp_path: Path) -> None:
    """They are most of what a command would wait for before it does anything, and the driver of a run keeps them."""
    (tmp_path / "job.yaml").write_text(
        CHAIN.replace("PROMPTS", str(ROOT / "jobs/examples/quickstart/prompts.jsonl")).replace(
            "PICTURES", str(ROOT / "jobs/examples/quickstart/photographs.jsonl")
        )
    )
    code = (
        "import json, sys\nfrom jobs.dry_run import plan\n"
        f"plans = plan({str(tmp_path / 'job.yaml')!r}, output={str(tmp_path / 'out')!r})\n"
        f"print(json.dumps([[one.plan.rows for one in plans], sorted({LATE!r} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[3, 64, 5, 5], []]
