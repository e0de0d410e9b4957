"""Many prompts end to end through `run_job`: rows a second, processor seconds and peak memory of the workers.

python -m benchmarks.ovi.prompts_scale --method linear --prompts 100000 --reference out/captioned
python -m benchmarks.ovi.prompts_scale --method direct --prompts 100000
python -m benchmarks.ovi.prompts_scale --method ovi --prompts 10000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.ovi.setting import RESULTS, machine
from jobs.run import run_job
from micro import world

METHODS = {
    "linear": {"method": "linear"},
    "direct": {"method": "direct"},
    "ovi": {"method": "ovi", "compact": True},
}


def write_prompts(path: Path, count: int) -> int:
    """Captions of held-out scenes, one a line; returns how many differ."""
    words = np.random.default_rng(0)
    captions = [world.caption(world.sample_scene(index, "heldout"), words) for index in range(count)]
    path.write_text("".join(f"{caption}\n" for caption in captions))
    return len(set(captions))


def watch(stop: threading.Event, every: float, found: list[float], spent: dict[int, float]) -> None:
    """Resident memory of the workers below this process, in MB, every so many seconds; and of each, by its number, the
    processor seconds when it was last seen."""
    import psutil

    while not stop.wait(every):
        total = 0
        for child in psutil.Process().children(recursive=True):
            try:
                if "Worker" in child.name() or "python" in child.name() or "ray::" in child.name():
                    total += child.memory_info().rss
                    if "InvertPrompts" in " ".join(child.cmdline()) or "Actor" in " ".join(child.cmdline()):
                        spent[child.pid] = sum(child.cpu_times()[:2])
            except psutil.Error:
                continue
        found.append(total / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--reference",
        default="out/bench-reference",
        help="of benchmarks/{index/reference,ovi/captioned}.yaml",
    )
    parser.add_argument("--model")
    parser.add_argument("--method", choices=METHODS, default="direct")
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        distinct = write_prompts(prompts, options.prompts)
        config = {
            "job": "invert-prompts",
            "input": {"path": str(prompts)},
            "reference": options.reference,
            "methods": [METHODS[options.method]],
            "shard_rows": max(100, options.prompts // 20),
            "resources": {"workers": options.workers, "cpus": 1},
            **({"encoder": options.model} if options.model else {}),
        }
        memory: list[float] = []
        spent: dict[int, float] = {}
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(stop, 1.0, memory, spent), daemon=True)
        watcher.start()
        started = time.perf_counter()
        done = run_job(config, output=str(Path(folder) / "out"))
        seconds = time.perf_counter() - started
        stop.set()
        watcher.join()
    quarter = len(memory) // 4
    line = {
        "machine": machine(),
        "state": done.state,
        "prompts": options.prompts,
        "distinct": distinct,
        "ok": done.ok,
        "seconds": seconds,
        "prompts_per_second": done.ok / seconds,
        "prompts_per_worker_second": done.ok / sum(spent.values()) if spent else None,
        "memory_mb": {
            "second_quarter": float(np.mean(memory[quarter : 2 * quarter])) if quarter else None,
            "last_quarter": float(np.mean(memory[-quarter:])) if quarter else None,
            "peak": max(memory, default=None),
        },
    }
    print(json.dumps(line, indent=1))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "prompts_scale.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**kept, options.method: line}, indent=1) + "\n")


if __name__ == "__main__":
    main()
