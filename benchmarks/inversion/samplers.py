"""Seeds for DPM-Solver++ 2M: what DDIM's seeds, diffusers' own inverse of 2M and the sweeps are worth under it.

    python -m benchmarks.inversion.samplers [--pictures 2] [--steps 20,10]

The shipped Stable Diffusion, held-out world pictures under their captions, guidance 1. dB of what diffusers' pipeline
with `DPMSolverMultistepScheduler` draws of a seed, against the decoded latent that was inverted; passes of the network
a picture. `DPMSolverMultistepInverseScheduler` goes up in as many steps as the sampler goes down in (1), and in as many
as the sweeps make passes (2).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
from PIL import Image

from micro import world
from stages.inversion.metrics import measure_pictures
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel

RESULTS = Path(__file__).parent / "results" / "samplers.json"


def seeds_of(pictures: list[dict[str, Any]], steps: int, **sampler: Any) -> tuple[torch.Tensor, float, Any]:
    """The seeds of lbo, the mean of its passes, and the model."""
    settings = InvertImagesSettings(
        device="cpu", steps=steps, slots=len(pictures), pictures=False, reconstruct=False, **sampler
    )
    model = open_latent_model(settings)
    rows = sorted(InvertImages(settings, model)(pictures), key=lambda row: row["id"])
    passes = sum(row["forwards"] for row in rows) / len(rows)
    return torch.stack([torch.from_numpy(row["latent"]) for row in rows]), passes, model


def drawn(model: LatentModel, captions: list[str], steps: int, seed_BCHW: torch.Tensor) -> torch.Tensor:
    """Pictures (decoded) that diffusers' pipeline draws by 2M."""
    pipe = model.pipeline  # type: ignore[attr-defined]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(dict(model.geometry.scheduler))
    z_BCHW = pipe(captions, num_inference_steps=steps, guidance_scale=1.0, latents=seed_BCHW, output_type="latent")
    return model.decode(z_BCHW.images)


def peer(model: LatentModel, captions: list[str], steps: int, z_BCHW: torch.Tensor) -> torch.Tensor:
    """Seeds by diffusers' own inverse of 2M: one pass a step."""
    inverse = DPMSolverMultistepInverseScheduler.from_config(dict(model.geometry.scheduler))
    inverse.set_timesteps(steps)
    predict, condition = model.predictor(), model.condition(captions)
    for t in inverse.timesteps:
        z_BCHW = inverse.step(predict(z_BCHW, t.expand(len(z_BCHW)), condition), t, z_BCHW).prev_sample
    return z_BCHW


@torch.no_grad()
def main(pictures: int = 2, steps: str = "20,10") -> None:
    """Measure, print, and write to the results."""
    captions = [world.caption_of(i, "heldout") for i in range(pictures)]
    images = [world.picture(i, "heldout") for i in range(pictures)]
    x_BCHW = torch.stack([(torch.from_numpy(image) / 127.5 - 1).permute(2, 0, 1) for image in images])
    rows = [{"id": str(i), "image": Image.fromarray(images[i]), "prompt": captions[i], "method": "lbo"}
            for i in range(pictures)]  # fmt: skip
    measured: list[dict[str, Any]] = []
    for count in map(int, steps.split(",")):
        before, spent, _ = seeds_of(rows, count)
        scheduler = {"class": "DPMSolverMultistepScheduler"}
        after, passes, model = seeds_of(rows, count, sampler="model", scheduler=scheduler)
        z_0_BCHW = model.encode(x_BCHW)
        wanted = model.decode(z_0_BCHW)
        same = round(passes)
        seeds = {
            "lbo for DDIM": (before, spent),
            "inverse scheduler, as many steps": (peer(model, captions, count, z_0_BCHW), count),
            "inverse scheduler, as many passes": (peer(model, captions, same, z_0_BCHW), same),
            "lbo, sampler: model": (after, passes),
        }
        found: dict[str, Any] = {"steps": count}
        for name, (seed_BCHW, made) in seeds.items():
            values = measure_pictures(drawn(model, captions, count, seed_BCHW), wanted)["psnr"]
            found[name] = {"dB": round(sum(values) / len(values), 1), "passes": round(made, 1)}
        print(json.dumps(found), flush=True)
        measured.append(found)
        RESULTS.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
