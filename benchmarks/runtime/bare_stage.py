"""`run-job` against the bare stage, one worker: `invert-images` by `lbo` on the miniature Stable Diffusion, pictures in
a folder of PNGs. The bare stage is given the same pictures decoded, in a process of its own; the two take turns.
Counted in the process of the worker, from the first row that the stage takes to the file of the last shard: processor
time of all threads (reading, decoding, the stage, Parquet, checksums, fsync), and wall time. Prints a table, and writes
benchmarks/runtime/results/bare_stage.json.

    OMP_NUM_THREADS=1 python -m benchmarks.runtime.bare_stage [--rows 160] [--shard-rows 40] [--steps 10] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.schema.base import RowJob
from jobs.schema.reading import load
from pipeline.contract import Row
from pipeline.output.dataset import Output
from pipeline.run.draft import RunSpec
from pipeline.run.driver import run
from pipeline.run.tasks import Resources
from stages.inversion.stage import InvertImages

RESULTS = Path(__file__).parent / "results"


class Timed(InvertImages):
    """Notes its process's clocks at the first row, and tells them with those of each shard's end."""

    first: tuple[float, float] | None = None

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return super().__call__(map(self._noted, rows))

    def _noted(self, row: Row) -> Row:
        if self.first is None:
            self.first = time.perf_counter(), time.process_time()
        return row

    def spent(self) -> np.ndarray:
        """Seconds since the first row: on the wall, of the processor."""
        wall, cpu = self.first or (time.perf_counter(), time.process_time())
        return np.array([time.perf_counter() - wall, time.process_time() - cpu])

    def take_summary(self) -> dict[str, np.ndarray]:
        return {"spent": self.spent()}


def job_of(folder: Path, steps: int) -> RowJob:
    job = load({
        "job": "invert-images", "input": str(folder), "prompt": "", "methods": ["lbo"], "steps": steps, "slots": 16,
        "reconstruct": False, "pictures": False,
    })  # fmt: skip
    assert isinstance(job, RowJob)
    return job


def bare(folder: Path, steps: int) -> None:
    """Print the seconds that the stage alone takes."""
    from PIL import Image

    stage = job_of(folder, steps).stage()
    built: Any = Timed(Timed.Settings(**stage.params))
    rows = [{"id": f"{path.name}/lbo", "image": Image.open(path).convert("RGB"), "method": "lbo"}
            for path in sorted(folder.glob("*.png"))]  # fmt: skip
    assert all(row["status"] == "ok" for row in built(rows))
    print(json.dumps(built.spent().tolist()))


def whole(folder: Path, output: Path, steps: int, shard_rows: int) -> list[float]:
    """The same of a run."""
    job = job_of(folder, steps)
    stage = replace(job.stage(), target="benchmarks.runtime.bare_stage:Timed")
    result = run(RunSpec(stage, job.source(), str(output), shard_rows=shard_rows), resources=Resources(max_workers=1))
    assert result.state == "complete", result
    found: list[float] = np.max([one["spent"] for one in Output.open(str(output)).summaries()], axis=0).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime.bare_stage")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--shard-rows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bare", type=Path)
    asked = parser.parse_args()
    if asked.bare is not None:
        bare(asked.bare, asked.steps)
        return
    import ray

    from benchmarks.inversion.pictures import world_rows

    root = str(Path(__file__).parents[2])
    told = {"PYTHONPATH": root, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    found: dict[str, list[list[float]]] = {"run-job": [], "bare stage": []}
    with tempfile.TemporaryDirectory(prefix="latentmill-bare-") as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        for number, row in enumerate(world_rows(asked.rows)):
            row["image"].save(folder / f"{number:05}.png")
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=150_000_000,
                 log_to_driver=False, runtime_env={"env_vars": told})  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.runtime.bare_stage", "--steps", str(asked.steps), "--bare"]
        for turn in range(asked.rounds):
            found["run-job"].append(whole(folder, Path(name) / f"out-{turn}", asked.steps, asked.shard_rows))
            done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
            found["bare stage"].append(json.loads(done.stdout.splitlines()[-1]))
        ray.shutdown()
    best = {name: min(cpu for _, cpu in rounds) for name, rounds in found.items()}
    for name, cpu in best.items():
        print(f"| {name} | {cpu:.1f} s of the processor | {asked.rows / cpu:.2f} rows / CPU s |")
    print(f"run-job: {best['bare stage'] / best['run-job']:.3f} of the bare stage")
    note = {**vars(asked), "bare": None, "load_at_end": os.getloadavg()[0], "seconds (wall, cpu)": found}
    (RESULTS / "bare_stage.json").write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
