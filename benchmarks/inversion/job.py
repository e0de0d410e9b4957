"""Pictures end to end: `invert-images` through `run_job`, killed once, resumed, verified, every row regenerated.

    python -m benchmarks.inversion.job [--pictures 2000]

Regeneration is plain diffusers on the finished dataset, as its card shows it, in batches; its PSNR must be the row's.
Writes benchmarks/inversion/results/inversion_job.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import micro
from benchmarks.inversion.table import RESULTS
from benchmarks.ovi.setting import machine
from benchmarks.runtime.killed_job import run_killed_once

MODEL = str(micro.MODELS / "stable-diffusion")


def regenerate(out: str, steps: int, batch: int = 50) -> dict[str, Any]:
    """Every row's picture again from its seed, and its PSNR against the picture beside the row's own figure."""
    from datasets import load_dataset
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    data = load_dataset(out, split="train")
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    difference, again = [], []
    for start in range(0, len(data), batch):
        rows = data[start : start + batch]
        seeds = torch.tensor(np.stack(rows["latent"]), dtype=torch.float32).reshape(-1, *shape)
        pictures = pipe(
            rows["prompt"], num_inference_steps=steps, guidance_scale=1.0, latents=seeds, output_type="np"
        ).images
        truth = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in rows["picture"]])
        psnr = -10 * np.log10(np.square(pictures - truth).mean((1, 2, 3)))
        again += psnr.tolist()
        difference += np.abs(psnr - np.array(rows["psnr"])).tolist()
    return {"rows": len(again), "psnr": float(np.mean(again)), "largest_difference_db": float(max(difference))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out/inversion-job"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    config = {
        "job": "invert-images",
        "input": {
            "path": f"micro-world://heldout?rows={options.pictures}",
            "columns": {"image": "image", "prompt": "caption"},
        },
        "model": MODEL,
        "steps": options.steps,
        "methods": ["lbo"],
        "slots": 32,
        "shard_rows": options.pictures // 10,
        "resources": {"workers": options.workers, "cpus": 1},
    }
    found = run_killed_once(config, options.folder, kill_at=3)
    began = time.perf_counter()
    found["regenerated"] = regenerate(str(options.folder / "out"), options.steps)
    found["regenerated"]["seconds"] = time.perf_counter() - began
    found |= {"machine": machine(), "pictures": options.pictures, "steps": options.steps}
    (RESULTS / "inversion_job.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
