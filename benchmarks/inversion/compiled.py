"""What `accelerate: compile` is worth: the same pictures inverted by the network as it is and by the compiled one, in
turns, one thread, CPU seconds of the process.

    python -m benchmarks.inversion.compiled [--models flux sd3 stable-diffusion] [--pictures 32]

Encoding and captions are left out, and so is compiling, whose seconds stand by themselves. Writes
benchmarks/inversion/results/compiled.json.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from benchmarks.inversion.pictures import world_rows
from benchmarks.inversion.table import RESULTS
from benchmarks.ovi.setting import machine
from stages.engine.solver import solve
from stages.inversion.settings import InvertImagesSettings, LboMethod
from stages.inversion.stage import InvertImages

WAYS = {"as it is": None, "compiled": "compile"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["flux", "sd3", "stable-diffusion"], help="shipped miniatures")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: side_by_side(f"micro:{name}", options) for name in options.models}
    note = {"machine": machine(), "steps": options.steps, "pictures": options.pictures, "models": found}
    (RESULTS / "compiled.json").write_text(json.dumps(note, indent=1) + "\n")


def side_by_side(model: str, options: argparse.Namespace) -> dict[str, Any]:
    stages, first = {}, {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for way, accelerate in WAYS.items():
        settings = InvertImagesSettings(
            model=model, accelerate=accelerate, methods=[LboMethod()], steps=options.steps, slots=options.pictures,
            device="cpu",
        )  # fmt: skip
        stages[way] = InvertImages(settings)
    rows: dict[str, list[dict[str, Any]]] = {}
    for turn in range(options.turns + 1):
        for way, stage in stages.items():
            scheme = stage.schemes["lbo"]
            ready = list(stage.prepared(scheme, world_rows(options.pictures), {}))
            began, cpu = time.perf_counter(), time.process_time()
            rows[way] = list(solve(scheme.problem(options.pictures), ready))
            if turn:
                seconds[way].append((time.process_time() - cpu) / options.pictures)
            else:  # the first one compiles
                first[way] = time.perf_counter() - began
    seeds = [np.stack([one["noise"] for one in sorted(rows[way], key=lambda one: one["id"])]) for way in WAYS]
    medians = {way: float(np.median(values)) for way, values in seconds.items()}
    made: dict[str, Any] = {
        "cpu_seconds_an_image": medians, "times_as_fast": medians["as it is"] / medians["compiled"],
        "seconds_of_the_first_turn": first,
        "passes_an_image": {way: float(np.mean([row["forwards"] for row in rows[way]])) for way in WAYS},
        "relative_difference_of_seeds": float(np.linalg.norm(seeds[1] - seeds[0]) / np.linalg.norm(seeds[0])),
    }  # fmt: skip
    print(model, json.dumps(made), flush=True)
    return made


if __name__ == "__main__":
    main()
