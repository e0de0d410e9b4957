"""Few-step and distilled models: the published scheduler configurations on random weights of their architectures. Each
is inverted to its own sampler where that is deterministic, else to DDIM, and drawn again by the stock pipeline, loaded
as a dataset's card says; or it is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy import asarray
from safetensors.torch import load_file, save_file

from benchmarks.inversion.stock import Stock
from stages.inversion.metrics import measure_pictures
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from tests.stages.inversion.test_stage import picture
from tests.support import tiny_flows, tiny_stable_diffusion

CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "prediction_type": "epsilon", "steps_offset": 1}  # fmt: skip
TURBO = {**CHAIN, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
SD_TURBO = {**CHAIN, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
LCM = {**CHAIN, "_class_name": "LCMScheduler", "set_alpha_to_one": True, "original_inference_steps": 50,
       "timestep_spacing": "leading", "clip_sample": False}  # fmt: skip
LIGHTNING = {"class": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
MODELS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "FLUX.1-schnell": ("flux-schnell", None, {}),
    "SD3.5-large-turbo": ("sd35-large", None, {}),
    "SDXL-Turbo": ("sdxl", TURBO, {}),
    "SDXL-Turbo, one step": ("sdxl", TURBO, {"steps": 1}),
    "SD-Turbo": ("sd", SD_TURBO, {"sampler": "model"}),
    "SD-Turbo, one step": ("sd", SD_TURBO, {"sampler": "model", "steps": 1}),
    "SDXL-Lightning": ("sdxl", None, {"sampler": "model", "scheduler": LIGHTNING}),
    "Hyper-SD": ("sdxl", None, {"scheduler": {"timestep_spacing": "trailing"}}),
    "LCM": ("lcm", LCM, {"scheduler": {"timestep_spacing": "trailing"}, "guidance": 8.0}),
}
"""Name -> architecture, its scheduler's configuration, what a job says of it."""


def folder_of(target: Path, kind: str, scheduler: dict[str, Any] | None) -> str:
    """A folder as it is published: index, scheduler, and a guidance that the network hears. Outputs are gently bent: a
    random U-Net's own are not like a trained one's, which nearly is the identity where there is only noise."""
    if kind in tiny_flows.KINDS:
        return tiny_flows.build(target, kind)
    options = {"time_cond_proj_dim": 8} if kind == "lcm" else {}
    folder = Path(tiny_stable_diffusion.build(target, "sdxl" if kind == "sdxl" else "sd", **options))
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.weight"] *= 0.05
    if kind == "lcm":
        generator = torch.Generator().manual_seed(7)
        told = "time_embedding.cond_proj.weight"
        weights[told] = torch.randn(weights[told].shape, generator=generator)  # starts at nothing
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    vae = json.loads((folder / "vae" / "config.json").read_text()) | {"scaling_factor": 4.0}
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    index = json.loads((folder / "model_index.json").read_text())
    if kind == "lcm":
        index["_class_name"] = "LatentConsistencyModelPipeline"
    if scheduler is not None:
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def rows() -> list[dict[str, Any]]:
    return [{"id": str(i), "image": picture(i), "prompt": said, "method": "lbo"} for i, said in enumerate(["red", ""])]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_few_step_model_is_inverted_to_its_sampler(tmp_path: Path, name: str) -> None:
    kind, scheduler, options = MODELS[name]
    settings = InvertImagesSettings(
        model=folder_of(tmp_path, kind, scheduler), device="cpu", size=16,
        methods=({"method": "lbo", "tolerance": 1e-5, "passes": 40},), **{"steps": 4, **options},
    )  # fmt: skip
    InvertImages.describe(settings)
    stage = InvertImages(settings)
    done = sorted(stage(rows()), key=lambda row: row["id"])
    assert all(row["status"] == "ok" and row["residual_max"] < 1e-4 for row in done), [row["error"] for row in done]
    seed = torch.stack([torch.from_numpy(row["latent"]) for row in done])
    assert all(torch.tensor([row["seed_std"] for row in done]).isfinite())
    drawn = Stock(stage.model, "float32")(seed, ["red", ""], settings.steps, settings.guidance)
    wanted = torch.stack([torch.from_numpy(asarray(row["picture"]).copy()) for row in done]).permute(0, 3, 1, 2)
    psnr = measure_pictures(drawn, wanted / 127.5 - 1)["psnr"]
    assert psnr == pytest.approx([row["psnr"] for row in done], abs=0.05)
    assert min(row["psnr_decoded"] for row in done) > 50


def test_guidance_that_is_told_asks_for_no_finer_solution(tmp_path: Path) -> None:
    """Two outputs far apart magnify what a step leaves over; one output does not."""
    for kind, tolerance in (("flux-dev", 1e-3), ("sd35-large", 1e-5), ("lcm", 1e-3), ("sdxl", 1e-5)):
        told = {"model": folder_of(tmp_path / kind, kind, None), "device": "cpu", "size": 16, "steps": 4}
        for guidance in (1.0, 3.5):
            stage = InvertImages(InvertImagesSettings(guidance=guidance, **told))
            rule = stage.schemes["lbo"].problem(2).rule
            assert rule.tolerance == (tolerance if guidance > 1 else 1e-3), (kind, guidance)


def test_what_a_few_step_model_does_not_do_is_said_before_it_is_loaded(tmp_path: Path) -> None:
    def refused(said: str, folder: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=said):
            InvertImages.describe(InvertImagesSettings(model=folder, device="cpu", steps=4, size=16, **options))

    schnell = folder_of(tmp_path / "schnell", "flux-schnell", None)
    refused("guidance: model .* has none .* leave `guidance` at 1", schnell, guidance=3.5)
    refused("negative: model .* has no negative prompt", schnell, negative="blue")
    turbo = folder_of(tmp_path / "turbo", "sdxl", TURBO)
    refused("EulerAncestralDiscreteScheduler adds fresh noise .* leave `sampler` out", turbo, sampler="model")
    lcm = folder_of(tmp_path / "lcm", "lcm", LCM)
    refused("LCMScheduler adds fresh noise .* leave `sampler` out", lcm, sampler="model")
    refused("negative: model .* has no negative prompt", lcm, guidance=8.0, negative="blue")
    refused("method null-text learns negative prompts", lcm, methods=["null-text"])
