"""Inversion by networks in half precision: dB and passes by tolerance, with and without the stop in the dtype's noise,
and under which networks the seeds regenerate. Shipped Stable Diffusion, LBO, 20 steps, one thread. Prints a table.

    python -m benchmarks.inversion.precision --pictures 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.inversion.pictures import world_rows
from stages.inversion import schemes
from stages.inversion.engine import InversionProblem
from stages.inversion.metrics import measure_pictures
from stages.inversion.settings import InvertImagesSettings, LboMethod
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.sampler import sample

STEPS = 20


class Unstopped(InversionProblem[Any]):
    """As if the network had no noise."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **{**options, "noise": 0.0})


def regenerated(model: LatentModel, z_0: LatentModel, done: list[dict[str, Any]], guidance: float) -> torch.Tensor:
    """dB of what a model makes of the seeds, against what the float32 autoencoder `z_0` makes of it, a row."""
    seeds = torch.from_numpy(np.stack([row["latent"] for row in done]))
    condition = model.condition([row["prompt"] for row in done], guided=guidance > 1)
    return z_0.decode(sample(model.predictor(guidance), model.schedule(STEPS), seeds, condition))


def measured(pictures: int) -> Iterator[list[str]]:
    rows = [{**row, "method": "lbo"} for row in world_rows(pictures)]
    full = open_latent_model(InvertImagesSettings(device="cpu"))
    with torch.no_grad():
        for dtype in ("float16", "bfloat16"):
            half = open_latent_model(InvertImagesSettings(device="cpu", dtype=dtype))
            for guidance, tight in ((1.0, 1e-5), (3.0, 1e-5)):
                for tolerance, problem in ((None, InversionProblem), (tight, Unstopped), (tight, InversionProblem)):
                    schemes.InversionProblem = problem  # type: ignore[attr-defined]
                    settings = InvertImagesSettings(
                        methods=(LboMethod(tolerance=tolerance),), steps=STEPS, guidance=guidance, dtype=dtype,
                        device="cpu", slots=4, pictures=True, reconstruct=False,
                    )  # fmt: skip
                    started = time.process_time()
                    done = list(InvertImages(settings, half)(rows))
                    seconds = time.process_time() - started
                    x_BCHW = torch.stack([torch.from_numpy(np.asarray(row["picture"]).copy()) for row in done])
                    z_BCHW = full.encode(x_BCHW.permute(0, 3, 1, 2) / 127.5 - 1)
                    aim = full.decode(z_BCHW)
                    dB = [
                        np.mean(measure_pictures(regenerated(model, full, done, guidance), aim)["psnr"])
                        for model in (full, half)
                    ]
                    passes = np.mean([row["forwards"] for row in done])
                    stop = "no" if problem is Unstopped else "yes"
                    told = "default" if tolerance is None else f"{tolerance:g}"
                    yield [dtype, f"{guidance:g}", told, stop, *(f"{x:.1f}" for x in (*dB, passes, seconds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| networks | guidance | tolerance | stops in noise | dB in float32 | dB in the same | passes | CPU s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for line in measured(given.pictures):
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
