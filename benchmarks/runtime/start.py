"""What a command costs before it does anything: CPU seconds and peak memory of ``run-job --dry-run``, by kind of job,
on the shipped models. With ``--before`` the same of another checkout, in turns; of each the least is taken.

    python -m benchmarks.runtime.start [--before FOLDER] [--rounds 3]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
import yaml

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "start.json"
EXAMPLES = ROOT / "jobs" / "examples" / "quickstart"
PICTURES = {"job": "invert-images", "input": {"path": str(EXAMPLES / "photographs.jsonl"), "images": ["image"]}}
JOBS: dict[str, dict[str, Any]] = {
    "reference": {"job": "reference", "input": "micro-world://train?rows=30&seed=0", "encoder": "micro:prior"},
    "invert-prompts": {
        "job": "invert-prompts", "input": str(EXAMPLES / "prompts.jsonl"), "encoder": "micro:prior", "methods": ["ovi"],
    },
    "learn-concepts": {
        "job": "learn-concepts", "input": str(EXAMPLES / "concepts"), "model": "micro:stable-diffusion",
    },
    "invert-images, U-Net": {**PICTURES, "model": "micro:stable-diffusion"},
    "invert-images, FLUX": {**PICTURES, "model": "micro:flux", "size": 128, "methods": ["euler"]},
}  # fmt: skip


def planned(checkout: Path, job: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of planning a job."""
    command = [sys.executable, "-m", "jobs", "run-job", str(job), "-o", str(job.with_suffix("")), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} in {checkout} ended with {child.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def main(before: Path | None = None, rounds: int = 3) -> None:
    """Measure, print, and write to the results."""
    checkouts = {"now": ROOT} if before is None else {"before": before.resolve(), "now": ROOT}
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, job) in enumerate(JOBS.items()):
            file = Path(folder) / f"{number}.yaml"
            file.write_text(yaml.safe_dump(job))
            runs: dict[str, list[tuple[float, float]]] = {when: [] for when in checkouts}
            for _ in range(rounds):
                for when, checkout in checkouts.items():
                    runs[when].append(planned(checkout, file))
            least = {when: [min(column) for column in zip(*made, strict=True)] for when, made in runs.items()}
            found[name] = {when: {"cpu_s": round(s, 2), "mb": round(mb)} for when, (s, mb) in least.items()}
            print(json.dumps({name: found[name]}), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
