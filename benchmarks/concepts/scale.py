"""Concepts an hour: many in one batch against one at a time; and a job of 200 concepts, killed once and resumed.

    python -m benchmarks.concepts.scale [--concepts 16] [--steps 20]    side by side, one process, one thread count
    python -m benchmarks.concepts.scale --job --concepts 200 --steps 20   through run_job; the worker's memory over time

Speed does not depend on what the weights are, so random ones serve where the trained ones are missing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import micro

RESULTS = Path(__file__).parent / "results"
MODEL = str(micro.MODELS / "stable-diffusion")


def side_by_side(model_path: str, concepts: int, steps: int, slots: list[int], threads: int) -> dict[str, Any]:
    """The same concepts by the same engine with different numbers of slots, interleaved; seconds a concept step."""
    import torch

    from benchmarks.concepts.ablation import targets, training_row
    from stages.concepts.prepare import prepare
    from stages.concepts.problem import LegoProblem
    from stages.concepts.settings import LegoSettings, Templates
    from stages.engine.solver import Occupancy, solve
    from stages.models.families import open_latent_model
    from stages.models.settings import LatentModelSettings

    torch.set_num_threads(threads)
    model = open_latent_model(LatentModelSettings(model=model_path, device="cpu"))
    settings = LegoSettings(steps=steps, window=steps)
    kinds = targets()
    rows = [training_row(kinds[n % len(kinds)], n // len(kinds), 2) for n in range(concepts)]
    ready = [{**row, "prepared": prepare(row, model, settings, Templates(), max_words=3, root="")} for row in rows]
    found: dict[str, Any] = {}
    for count in slots:
        some = ready if count > 1 else ready[: max(2, concepts // 4)]
        problem = LegoProblem(model, settings, slots=count, max_words=3, seed=0)
        occupancy = Occupancy()
        wall, cpu = time.perf_counter(), time.process_time()
        learned = list(solve(problem, some, occupancy=occupancy))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert all(row["status"] == "ok" for row in learned)
        found[str(count)] = {
            "concepts": len(some),
            "wall_seconds_a_concept": wall / len(some),
            "cpu_seconds_a_concept": cpu / len(some),
            "concepts_an_hour_of_3000_steps": 3600 / (wall / len(some) * 3000 / steps),
            "occupancy": occupancy.share,
        }
        print(count, json.dumps(found[str(count)]), flush=True)
    one = found[str(slots[0])]
    for one_of in found.values():
        one_of["speedup_wall"] = one["wall_seconds_a_concept"] / one_of["wall_seconds_a_concept"]
        one_of["speedup_cpu"] = one["cpu_seconds_a_concept"] / one_of["cpu_seconds_a_concept"]
    return found


def write_table(folder: Path, concepts: int) -> Path:
    """A Parquet table of concepts with their pictures inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.concepts.ablation import targets, training_row

    def png(picture: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    kinds, rows = targets(), []
    for number in range(concepts):
        row = training_row(kinds[number % len(kinds)], number // len(kinds), 2)
        plain = {k: row[k] for k in ("name", "concept", "subject", "prompt_with", "prompt_without", "prompt_plain")}
        plain |= {side: [png(p) for p in row[side]] for side in ("with", "without")}
        rows.append(plain | {key: json.dumps(row[key]) for key in ("start", "positive", "negative")})
    path = folder / "concepts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_job(model_path: str, concepts: int, steps: int, slots: int, folder: Path) -> dict[str, Any]:
    """The whole way through run_job, killed by SIGKILL once, resumed, verified."""
    from benchmarks.runtime.killed_job import run_killed_once

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "job": "learn-concepts",
        "input": {"path": str(write_table(folder, concepts)), "id": "name"},
        "model": model_path,
        "learning": {"steps": steps, "window": steps // 2},
        "slots": slots,
        "max_words": 3,
        "shard_rows": 25,
        "checkpoint_seconds": 5,
    }
    return {"concepts": concepts, "steps": steps, **run_killed_once(config, folder, kill_at=3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder; left out: the shipped miniature")
    parser.add_argument("--concepts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--job", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("out/lego-scale"))
    options = parser.parse_args()
    if options.job:
        found = as_job(options.model or MODEL, options.concepts, options.steps, options.slots[-1], options.folder)
        name = "lego_scale_job"
    else:
        found = side_by_side(options.model or MODEL, options.concepts, options.steps, options.slots, options.threads)
        name = "lego_scale"
    RESULTS.mkdir(exist_ok=True)
    note = {
        "load_average": os.getloadavg(),
        "settings": {k: str(v) for k, v in vars(options).items() if k != "folder"},
        "result": found,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(note, indent=2))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
