"""Memory of a worker that embeds large pictures: its peak, and what it makes of them.

    python -m benchmarks.runtime.picture_memory [--rows 150] [--megapixels 6] [--threads 2] [--batch 32] [--draft 128]

JPEGs go through `reference`'s stage on the miniature encoder in this process, as a worker on Ray would take them. The
pictures are a gradient with noise, so that they decode as slowly as photographs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.run import run_spec
from jobs.schema.reading import load
from pipeline.input.read import wanted_columns
from pipeline.output.schema import encode_schema
from pipeline.run.draft import draft
from pipeline.run.survey import Survey, survey
from pipeline.run.tasks import Task, WorkerJob
from pipeline.run.worker import Worker

RESULTS = Path(__file__).parent / "results"


def pictures(folder: Path, count: int, megapixels: float) -> None:
    """Ten different ones, under as many names as are asked for."""
    side = round((megapixels * 1e6) ** 0.5)
    ramp = np.linspace(0, 200, side, dtype=np.float32)
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        if number >= 10:
            path.write_bytes((folder / f"{number % 10:04d}.jpg").read_bytes())
            continue
        noise = np.random.default_rng(number).integers(0, 56, (side, side, 3), dtype=np.uint8)
        tilted = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], (ramp[:, None] + ramp) / 2], axis=-1)
        Image.fromarray((tilted + noise).astype(np.uint8)).save(path, quality=90)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(folder: Path, rows: int, threads: int, batch: int, settings: dict[str, object]) -> dict[str, object]:
    """One worker, one shard."""
    job = load({"job": "reference", "encoder": "micro:prior", "batch_size": batch, "shard_rows": rows,
                "input": {"path": str(folder), **settings}})  # fmt: skip
    spec = run_spec(job, str(folder / "out"))
    drafted = draft(spec)
    shard = next(survey(drafted.source, rows, rows, Survey(), lambda file, scan: None))
    worker = Worker(WorkerJob(
        stage=spec.stage, source=drafted.source, wanted=wanted_columns(drafted.source, ()), kept=drafted.kept,
        schema=encode_schema(drafted.schema), columns=drafted.info.columns, output=spec.output, storage_options={},
        reads=drafted.info.reads, decode_threads=threads,
    ))  # fmt: skip
    before, begun, spent = peak_mb(), time.perf_counter(), time.process_time()
    digest = hashlib.blake2b(digest_size=8)
    for table in worker._tables(Task.of(shard)):
        done = table.result()
        assert set(done["status"].to_pylist()) == {"ok"}, done["error"].to_pylist()
        digest.update(np.asarray(done["embedding"].combine_chunks().flatten()).tobytes())
    return {
        "rows": rows, "threads": threads, "batch": batch, "peak_mb_before": round(before),
        "peak_mb": round(peak_mb()), "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - spent, 1), "embeddings": digest.hexdigest(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime.picture_memory")
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--megapixels", type=float, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--draft", type=int, help="the input's option of that name")
    parser.add_argument("--name", default="now", help="under which the figures are kept")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pictures(Path(scratch), chosen.rows, chosen.megapixels)
        found = measure(Path(scratch), chosen.rows, chosen.threads, chosen.batch, {"draft": chosen.draft})
    path = RESULTS / "picture_memory.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[chosen.name] = {"megapixels": chosen.megapixels, "draft": chosen.draft, **found}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept[chosen.name]))


if __name__ == "__main__":
    main()
