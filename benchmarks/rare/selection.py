"""A large pool through `select-corpus`, once undisturbed and once killed twice by SIGKILL: nothing lost, and the same
training set to the byte.

    python -m benchmarks.rare.selection [--pool 16000] [--keep 250]

Candidates are pictures of the miniature world with one kind of object, their classes its shape and colour; the score is
drawn at random.
Writes results/selection.json.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.ovi.setting import machine
from benchmarks.runtime.killed_job import committed
from micro import world
from pipeline.output.verify import verify

RESULTS = Path(__file__).parent / "results"
FILE_ROWS = 2000


def write(folder: Path, count: int) -> int:
    """The pool as Parquet files; its classes' number."""
    rng, rows, classes, index, written = np.random.default_rng(0), [], set(), 0, 0
    while written < count:
        scene = world.sample_scene(index)
        first = scene.things[0]
        if all((thing.shape, thing.color) == (first.shape, first.color) for thing in scene.things):
            file = io.BytesIO()
            Image.fromarray(world.render(scene)).save(file, "PNG")
            rows.append({"id": f"{index:07d}", "image": file.getvalue(), "concept": f"{first.color} {first.shape}",
                         "score": float(rng.uniform())})  # fmt: skip
            classes.add(rows[-1]["concept"])
            written += 1
        index += 1
        if len(rows) == FILE_ROWS or (rows and written == count):
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{written:07d}.parquet")
            rows = []
    return len(classes)


def run(config: dict[str, Any], out: str, kill_at: tuple[int, ...]) -> float:
    """Seconds of a job that is killed at so many committed shards, each time, and started again."""
    code = f"from jobs.run import run_job; r = run_job({config!r}, output={out!r})"
    code += "; raise SystemExit(0 if r.state == 'complete' else f'{r.state}: {r.reason}')"
    began = time.perf_counter()
    for until in (*kill_at, None):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        while process.poll() is None:
            if until is not None and committed(out) >= until:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
        if until is None and process.returncode:
            raise SystemExit(f"the job ended with {process.returncode}; see {out}")
    return time.perf_counter() - began


def digests(out: Path) -> dict[str, str]:
    """Of every file of the training set and of the selection's own."""
    files = [*(out / "corpus").rglob("*"), out / "selection.parquet", out / "balance.json"]
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=16_000)
    parser.add_argument("--keep", type=int, default=250, help="of each class, at most")
    parser.add_argument("--folder", type=Path, help="kept; left out: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        (folder / "pool").mkdir(parents=True)
        classes = write(folder / "pool", options.pool)
        config = {
            "job": "select-corpus", "input": {"path": str(folder / "pool"), "id": "id"}, "encoder": "micro:prior",
            "count": options.keep, "near": 1.0, "shard_rows": options.pool // 16, "export": "parquet",
        }  # fmt: skip
        seconds = {
            name: run(config, str(folder / name), kills) for name, kills in (("undisturbed", ()), ("killed", (3, 9)))
        }
        found = {name: digests(folder / name) for name in seconds}
        reports = {name: verify(str(folder / name)) for name in seconds}
        selection = pq.read_table(folder / "killed" / "selection.parquet").to_pylist()
        note = {
            "machine": machine(), "pool": options.pool, "classes": classes,
            "kept": sum(row["kept"] for row in selection),
            "candidates_told_of": len({row["id"] for row in selection}), "files": len(found["killed"]),
            "the_same_bytes": found["killed"] == found["undisturbed"], "seconds": seconds,
            "verify_ok": {name: report.ok for name, report in reports.items()},
            "rows_ok": {name: report.rows_ok for name, report in reports.items()},
        }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "selection.json").write_text(json.dumps(note, indent=1) + "\n")
    print(json.dumps(note, indent=1))


if __name__ == "__main__":
    main()
