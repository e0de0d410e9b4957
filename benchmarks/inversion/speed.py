"""Images a second of the batched engine: beside the same method one image at a time, and in static batches.

    python -m benchmarks.inversion.speed [--pictures 96] [--slots 32]

Static batches are of two kinds: ``lockstep``, as inversion is usually written, where a batch stands at one timestep and
goes on when its slowest row is done with it; and ``static``, where rows climb on their own and only the next batch
waits. The same code and the same pictures (world scenes, photographs and their tiles, mixed), in turns, one thread; the
time of encoding and captions, which all share, is left out, and so is regeneration. The result must not depend on the
company. Writes benchmarks/inversion/results/inversion_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.inversion.pictures import photograph_rows, world_rows
from benchmarks.inversion.table import RESULTS
from benchmarks.ovi.setting import machine
from pipeline.contract import Row, batches
from stages.engine.solver import Occupancy, solve
from stages.inversion.engine import InversionProblem, choose
from stages.inversion.schemes import Scheme
from stages.inversion.settings import DdimMethod, FixedPointMethod, InversionMethod, InvertImagesSettings, LboMethod
from stages.inversion.stage import InvertImages

METHODS: tuple[InversionMethod, ...] = (
    DdimMethod(),
    FixedPointMethod(name="fixed-point-3", iterations=3),
    FixedPointMethod(name="anderson-1e-3", iterations=9, acceleration="anderson", tolerance=1e-3),
    LboMethod(name="lbo"),
    LboMethod(name="lbo-1e-4", tolerance=1e-4),
)


class Lockstep(InversionProblem[Any]):
    """A batch that shares one timestep: rows that are done with it wait for the others."""

    def step(self) -> torch.Tensor:
        loaded_B = self.active_B
        self.active_B = loaded_B & (self.k_B == self.k_B[loaded_B].min())
        waiting_B, held = loaded_B & ~self.active_B, self.state
        super().step()
        self.active_B, self.state = self.active_B | waiting_B, choose(waiting_B, held, self.state)
        return ~self.active_B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--alone", type=int, default=12, help="pictures of the turn one at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photographs = photograph_rows(4)
    rows = world_rows(options.pictures - len(photographs)) + photographs
    order = np.random.default_rng(0).permutation(len(rows))
    settings = InvertImagesSettings(methods=METHODS, steps=options.steps, slots=options.slots, device="cpu")
    stage = InvertImages(settings)
    ready = list(stage.prepared(stage.schemes[METHODS[0].label], [rows[i] for i in order], {}))
    looked_at = {row["id"] for row in ready[:16]}
    found: dict[str, Any] = {}
    for method in METHODS:
        scheme = stage.schemes[method.label]

        def problem(
            slots: int, kind: type[InversionProblem] = InversionProblem, scheme: Scheme = scheme
        ) -> InversionProblem:
            return kind(
                scheme.predict, scheme.schedule, scheme.method.rule(1.0), slots=slots,
                latent_shape=stage.geometry.latent_shape, device=stage.device,
            )  # fmt: skip

        def static(
            some: Iterable[Row], occupancy: Occupancy, kind: type[InversionProblem] = InversionProblem,
            make: Any = problem,
        ) -> Iterator[Row]:  # fmt: skip
            held = make(options.slots, kind)
            for batch in batches(some, options.slots):
                yield from solve(held, batch, occupancy=occupancy)

        ways: dict[str, tuple[list[Row], Callable[[list[Row], Occupancy], Iterable[Row]]]] = {
            "one at a time": (ready[: options.alone], lambda s, o, make=problem: solve(make(1), s, occupancy=o)),
            "lockstep": (ready, partial(static, kind=Lockstep)),
            "static": (ready, static),
            "engine": (ready, lambda s, o, make=problem: solve(make(options.slots), s, occupancy=o)),
        }
        found[method.label] = {}
        noises: dict[str, dict[str, torch.Tensor]] = {}
        for name, (some, way) in ways.items():
            occupancy = Occupancy()
            began = time.process_time()
            done = list(way(some, occupancy))
            seconds = (time.process_time() - began) / len(some)
            noises[name] = {row["id"]: row["noise"] for row in done}
            judged = [row for row in done if row["id"] in looked_at]
            truth_BCHW = torch.stack([row["z"] for row in judged])
            mse = float((stage.regenerated(scheme, judged) - truth_BCHW).square().mean())
            found[method.label][name] = {
                "cpu_seconds_an_image": seconds, "images_a_second": 1 / seconds, "pictures": len(some),
                "occupancy": occupancy.share, "passes": float(np.mean([row["forwards"] for row in done])),
                "latent_mse": mse,
            }  # fmt: skip
        own = found[method.label]
        for name in ("one at a time", "lockstep", "static"):
            own[name]["engine_is_faster_by"] = own[name]["cpu_seconds_an_image"] / own["engine"]["cpu_seconds_an_image"]
            shared = noises[name].keys() & noises["engine"].keys()
            own[name]["largest_difference_of_seeds"] = max(
                float((noises[name][i] - noises["engine"][i]).abs().max()) for i in shared
            )
        print(method.label, json.dumps(own), flush=True)
    note = {"machine": machine(), "steps": options.steps, "slots": options.slots, "methods": found}
    (RESULTS / "inversion_speed.json").write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
