"""What a job would lose whose networks ran in bfloat16 where its file names no `dtype`: dB against the *pictures*,
which is what users see, of seeds found in float32 and in bfloat16. LBO, 20 steps, one thread, shipped models.
Prints a table.

    python -m benchmarks.inversion.default_dtype --pictures 8
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.inversion.pictures import world_rows
from stages.inversion.metrics import measure_pictures
from stages.inversion.settings import InvertImagesSettings, LboMethod
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.sampler import sample

STEPS = 20
MODELS = {"micro:stable-diffusion": (1.0, 3.0), "micro:flux": (1.0, 3.5)}
"""And the guidances it is inverted under."""


@torch.no_grad()
def measured(name: str, guidance: float, pictures: int) -> Iterator[list[str]]:
    rows = [{**row, "method": "lbo"} for row in world_rows(pictures)]
    told = {"model": name, "device": "cpu", "steps": STEPS, "guidance": guidance, "methods": (LboMethod(),)}
    models = {
        dtype: open_latent_model(InvertImagesSettings.model_validate(told | {"dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    }
    whole = models["float32"]
    for dtype, model in models.items():
        settings = InvertImagesSettings.model_validate(
            told | {"dtype": dtype, "slots": 8, "reconstruct": False, "pictures": True}
        )
        began = time.process_time()
        done = list(InvertImages(settings, model)(rows))
        seconds = (time.process_time() - began) / len(done)
        x_BCHW = torch.stack([torch.from_numpy(np.asarray(row["picture"]).copy()) for row in done])
        x_BCHW = x_BCHW.permute(0, 3, 1, 2) / 127.5 - 1
        seeds = torch.from_numpy(np.stack([row["latent"] for row in done])).float()
        dB = []
        for by in (whole, model):
            condition = by.condition([row["prompt"] for row in done], guided=guidance > 1)
            z_BCHW = sample(by.predictor(guidance), by.schedule(STEPS), seeds, condition)
            dB.append(np.mean(measure_pictures(whole.decode(z_BCHW), x_BCHW)["psnr"]))
        floor, passes = (np.mean([row[key] for row in done]) for key in ("floor_psnr", "forwards"))
        yield [name, f"{guidance:g}", dtype, *(f"{x:.2f}" for x in (floor, *dB)), f"{passes:.0f}", f"{seconds:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    titles = (
        "model",
        "guidance",
        "seeds of",
        "floor, dB",
        "dB in float32",
        "dB in the same",
        "passes",
        "CPU s a picture",
    )
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    for name, guidances in MODELS.items():
        for guidance in guidances:
            for line in measured(name, guidance, given.pictures):
                print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
