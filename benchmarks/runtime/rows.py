"""Rows of text through a trivial stage: rows a second, cost a row at several sizes, memory of the driver.

    python -m benchmarks.runtime.rows [--rows 10000 100000 1000000] [--workers 2]

The cost a row is planning plus wall time from the first shard's start to the published output: reading, the stage,
Parquet, checksums, fsync and records; without the start of Ray and of the workers, which does not depend on the rows.
``cpu`` is the processor time of driver and workers for the same work: it hardly depends on what else the machine does.
What a further row costs (``more``) is taken between one size and the next, which leaves out what every run pays once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.input.source import Source
from pipeline.output.dataset import Output
from pipeline.output.progress import Progress
from pipeline.output.verify import verify
from pipeline.run.driver import Resources, RunSpec, run

RESULTS = Path(__file__).parent / "results"


class Lengths:
    """The length of a text; the summary says what its process has worked since the stage was built."""

    def __init__(self) -> None:
        self._begun = time.process_time()

    def take_summary(self) -> dict[str, np.ndarray]:
        return {"process": np.array(os.getpid()), "cpu_s": np.array(time.process_time() - self._begun)}

    @staticmethod
    def describe() -> StageInfo:
        return StageInfo((Column("length", "int64"),))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            yield ok(row, length=len(row["text"]))


def measure(rows: int, workers: int, shard_rows: int) -> dict[str, float]:
    """One run over ``rows`` lines: seconds by part, rows a second, the driver's peak memory so far."""
    with tempfile.TemporaryDirectory(prefix="latentmill-rows-") as name:
        folder = Path(name)
        with open(folder / "in.txt", "w") as handle:
            handle.writelines(f"a picture of thing number {i}, in some style\n" for i in range(rows))
        source = Source((str(folder / "in.txt"),), columns={"text": "text"})
        stage = StageSpec("benchmarks.runtime.rows:Lengths")
        spec = RunSpec(stage, source, str(folder / "out"), shard_rows=shard_rows, keep=("text",))
        marks: dict[str, float] = {}

        def watch(progress: Progress) -> None:
            if progress.phase in ("starting", "finishing"):
                marks.setdefault(progress.phase, time.time())

        begun, worked = time.time(), time.process_time()
        result = run(spec, resources=Resources(max_workers=workers), progress=watch)
        ended, worked = time.time(), time.process_time() - worked
        ready = min(record.started for record in Output.open(spec.output).records())
        per_process: dict[int, float] = {}
        for summary in Output.open(spec.output).summaries():
            process, seconds = int(summary["process"]), float(summary["cpu_s"])
            per_process[process] = max(seconds, per_process.get(process, 0.0))
        assert result.state == "complete", result
        checked = time.monotonic()
        assert verify(spec.output).ok
        verified = time.monotonic() - checked
    planning = marks["starting"] - begun
    working = marks["finishing"] - ready
    total = planning + working + ended - marks["finishing"]
    return {
        "rows": rows,
        "shards": result.shards,
        "planning_s": planning,
        "working_s": working,
        "publishing_s": ended - marks["finishing"],
        "verify_s": verified,
        "us_per_row": 1e6 * total / rows,
        "rows_per_s": rows / total,
        "wall_s": total,
        "cpu_s": worked + sum(per_process.values()),
        "driver_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-rows", type=int, default=2_500)
    asked = parser.parse_args()
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    root = str(Path(__file__).parents[2])
    ray.init(address="local", num_cpus=asked.workers + 1, include_dashboard=False, object_store_memory=150_000_000,
             log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})  # fmt: skip
    measure(1000, asked.workers, asked.shard_rows)  # the driver's imports
    found = [measure(rows, asked.workers, asked.shard_rows) for rows in asked.rows]
    ray.shutdown()
    for less, more in zip([None, *found], found, strict=False):
        for clock in ("wall", "cpu"):
            extra = 0.0 if less is None else more[f"{clock}_s"] - less[f"{clock}_s"]
            more[f"more_{clock}_us"] = 1e6 * extra / (more["rows"] - less["rows"]) if less is not None else float("nan")
    RESULTS.mkdir(exist_ok=True)
    note = {"workers": asked.workers, "cores": os.cpu_count(), "load_at_end": os.getloadavg()[0], "runs": found}
    (RESULTS / "rows.json").write_text(json.dumps(note, indent=1) + "\n")
    names = list(found[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{run[name]:.6g}" for name in names) + " |" for run in found]
    (RESULTS / "rows.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
