"""Images a second on a rectified flow: the engine, the same one picture at a time, and the peers' own way, a loop over
one picture with the stock transformer of diffusers.

    python -m benchmarks.inversion.flow_speed [--pictures 64] [--steps 20] [--slots 16]

In turns, one thread, CPU seconds of the process; encoding and captions, which all share, and regeneration are left out.
The seeds of both ways must agree. Writes results/flow_speed.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import micro
from benchmarks.inversion.pictures import world_rows
from benchmarks.inversion.table import RESULTS
from benchmarks.ovi.setting import machine
from pipeline.contract import Row
from stages.engine.solver import Occupancy
from stages.inversion.settings import (
    EulerMethod,
    FireFlowMethod,
    InversionMethod,
    InvertImagesSettings,
    LboMethod,
    RfSolverMethod,
    UniInvMethod,
)
from stages.inversion.stage import InvertImages

METHODS: tuple[InversionMethod, ...] = (
    EulerMethod(), RfSolverMethod(), FireFlowMethod(), UniInvMethod(), LboMethod(name="lbo")
)  # fmt: skip
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


class Stock:
    """The transformer as FLUX's pipeline calls it, on packed latents of one picture."""

    def __init__(self, transformer: FluxTransformer2DModel, row: Row, guidance: float) -> None:
        self.transformer = transformer
        condition, (_, height, width) = row["condition"], row["z"].shape
        self.said = {
            "encoder_hidden_states": condition["text_BLE"][None], "pooled_projections": condition["pooled_BE"][None],
            "txt_ids": torch.zeros(len(condition["text_BLE"]), 3),
            "img_ids": FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
            "guidance": torch.tensor([guidance]),
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, z: torch.Tensor, sigma: float) -> torch.Tensor:
        return self.transformer(hidden_states=z, timestep=torch.tensor([sigma]), **self.said).sample


def euler(v: Velocity, z: torch.Tensor, steps: list[tuple[float, float]]) -> torch.Tensor:
    for s, s_next in steps:
        z = z + (s_next - s) * v(z, s)
    return z


def rf_solver(v: Velocity, z: torch.Tensor, steps: list[tuple[float, float]]) -> torch.Tensor:
    for s, s_next in steps:
        d = s_next - s
        z = z + d * v(z + d / 2 * v(z, s), s + d / 2)
    return z


def fireflow(v: Velocity, z: torch.Tensor, steps: list[tuple[float, float]]) -> torch.Tensor:
    last = None
    for s, s_next in steps:
        d = s_next - s
        last = v(z + d / 2 * (v(z, s) if last is None else last), s + d / 2)
        z = z + d * last
    return z


def uni_inv(v: Velocity, z: torch.Tensor, steps: list[tuple[float, float]]) -> torch.Tensor:
    last = None
    for s, s_next in steps:
        d = s_next - s
        last = v(z if last is None else z + d * last, s_next)
        z = z + d * last
    return z


LOOPS = {"euler": euler, "rf-solver": rf_solver, "fireflow": fireflow, "uni-inv": uni_inv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--alone", type=int, default=12, help="pictures of the turns one at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = InvertImagesSettings(
        model=str(micro.MODELS / "flux"), methods=METHODS, steps=options.steps, slots=options.slots, device="cpu"
    )
    stage = InvertImages(settings)
    ready = list(stage.prepared(stage.schemes[METHODS[0].label], world_rows(options.pictures), {}))
    transformer = FluxTransformer2DModel.from_pretrained(micro.MODELS / "flux/transformer").eval()
    sigmas = [0.0, *stage.schemes["euler"].schedule.sigma_S.tolist()]
    steps = list(itertools.pairwise(sigmas))
    found: dict[str, Any] = {}
    for method in METHODS:
        scheme = stage.schemes[method.label]

        own: dict[str, Any] = {}
        few, seeds = ready[: options.alone], {}
        for name, rows, slots in (("engine", ready, options.slots), ("one at a time", few, 1)):
            occupancy, began = Occupancy(), time.process_time()
            done = list(scheme.invert(rows, slots, occupancy))
            own[name] = {"images_a_second": len(rows) / (time.process_time() - began), "occupancy": occupancy.share}
            own[name]["passes"] = float(np.mean([row["forwards"] for row in done]))
            seeds[name] = {row["id"]: row["noise"] for row in done}
        if (loop := LOOPS.get(method.label)) is not None:
            began = time.process_time()
            seeds["plain loop"] = {}
            for row in few:
                packed = FluxPipeline._pack_latents(row["z"][None], 1, *row["z"].shape)
                height, width = stage.geometry.height, stage.geometry.width
                noise = loop(Stock(transformer, row, settings.guidance), packed, steps)
                seeds["plain loop"][row["id"]] = FluxPipeline._unpack_latents(noise, height, width, 8)[0]
            own["plain loop"] = {"images_a_second": len(few) / (time.process_time() - began)}
        for name, some in seeds.items():
            own[name]["engine_is_faster_by"] = own["engine"]["images_a_second"] / own[name]["images_a_second"]
            own[name]["largest_difference_of_seeds"] = max(
                float((noise - seeds["engine"][i]).abs().max()) for i, noise in some.items()
            )
        found[method.label] = own
        print(method.label, json.dumps(own), flush=True)
    note = {"machine": machine(), "steps": options.steps, "slots": options.slots, "methods": found}
    (RESULTS / "flow_speed.json").write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
