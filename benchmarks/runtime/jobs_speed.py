"""Processor time of jobs before and after: each small job on the shipped models, its rows through a worker, at an older
commit and at this one, in turns. Two processes without Ray, one thread a library, each on a tree of its own; each job
once beforehand, uncounted. Prints a table, and writes benchmarks/runtime/results/jobs_speed.json.

    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python -m benchmarks.runtime.jobs_speed /tmp/before [--jobs decode reference] [--rounds 2]

What a job does once all rows are in (`finish`: an index, a training, a choice) is not counted: it is in no worker. So
`train-inverter` and `judge-corpus`, which are little else, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
EXAMPLES = HERE.parents[2] / "jobs/examples"
WORLD = {"path": "micro-world://heldout?rows=ROWS", "columns": {"image": "image", "prompt": "caption"}}
JOBS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "invert-images": (48, 12, {
        "input": WORLD, "methods": ["ddim", "uni-inv", "lbo"], "steps": 10, "slots": 8, "reconstruct": 0.05,
        "pictures": False,
    }),
    "invert-prompts": (96, 12, {
        "input": {**WORLD, "columns": {"prompt": "caption"}}, "model": "micro:prior",
        "methods": ["text-embedding", {"method": "ovi", "compact": True, "slots": 8}],
    }),
    "decode": (80, 10, {
        "input": "EMBEDDINGS", "decode": {"model": "micro:decoder", "steps": 5, "guidance": 1.0, "batch": 8},
    }),
    "caption": (80, 10, {
        "input": WORLD, "model": "CAPTIONER", "question": "What is here?", "max_tokens": 12, "batch": 8,
    }),
    "reference": (160, 10, {"input": WORLD, "encoder": "micro:prior", "batch_size": 8}),
    "learn-concepts": (1, 1, {
        "input": str(EXAMPLES / "quickstart/concepts"), "model": "micro:stable-diffusion",
        "learning": {"steps": 20, "window": 10, "lr": 0.02, "context": "none"},
    }),
    "rare-concepts": (24, 12, {
        "input": str(EXAMPLES / "rare-concepts"), "model": "micro:stable-diffusion", "clip": "micro:prior",
        "methods": ["random", "slerp", "nao"], "count": 2, "candidates": 2, "score": ["text"], "steps": 5,
        "guidance": 4,
    }),
}  # fmt: skip
"""Rows planned at most, rows a shard, and the job, under keys that older commits know too; the words in capitals are
filled in."""


def serve() -> None:
    """In a tree of its own, new or old: do each job that is asked for, and answer with rows and seconds."""
    import torch

    torch.set_num_threads(1)
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    from jobs.schema.reading import load
    from pipeline.output.dataset import Output
    from pipeline.output.planfile import read_shards
    from pipeline.run.draft import RunSpec, draft
    from pipeline.run.driver import _worker_job
    from pipeline.run.plan import write_plan
    from pipeline.run.pool import _Member
    from pipeline.run.tasks import Resources, Task
    from pipeline.run.worker import Worker
    from pipeline.storage import Folder

    for line in sys.stdin:
        asked = json.loads(line)
        job: Any = load(asked["job"])
        with tempfile.TemporaryDirectory() as folder:
            options = {"shard_rows": asked["shard_rows"], "limit": asked["rows"]}
            spec = RunSpec(job.stage(), job.source(), f"{folder}/out", **options)
            write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
            output = Output.open(spec.output)
            worker = Worker(_worker_job(spec, output, Resources()))
            left = [Task.of(shard) for shard in read_shards(output.own)][::-1]
            rows = sum(task.stop - task.start for task in left)
            member: Any = _Member.__new__(_Member)
            member.tasks, member.holds = {}, getattr(worker, "holds", 0)
            spent = time.process_time()
            with ThreadPoolExecutor(16) as threads:
                while left or member.tasks:
                    while left and (not member.tasks or member.hungry):
                        task = left.pop()
                        member.tasks[threads.submit(worker.process, task)] = task
                    for future in wait(list(member.tasks), return_when=FIRST_COMPLETED).done:
                        record = future.result()
                        assert record.rows_failed == 0 or asked["job"]["job"] == "caption", record
                        del member.tasks[future]
            spent = time.process_time() - spent
        print(json.dumps({"rows": rows, "cpu_seconds": spent}), flush=True)


def filled(job: dict[str, Any], rows: int, words: dict[str, str]) -> dict[str, Any]:
    """The job with what stands in capitals filled in."""
    text = json.dumps(job).replace("rows=ROWS", f"rows={rows}")
    for word, value in words.items():
        text = text.replace(f'"{word}"', json.dumps(value))
    made: dict[str, Any] = json.loads(text)
    return made


class Tree:
    """A process that does jobs with the code of a folder."""

    def __init__(self, folder: Path) -> None:
        told = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", str(HERE), "--serve", "-"]
        self.process = subprocess.Popen(
            command, cwd=folder, env=told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def does(self, asked: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime.jobs_speed")
    parser.add_argument("before", type=Path, help="a checkout of an older commit")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve", action="store_true")
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    import numpy as np

    from tests.support.tiny_captioners import build_llava

    trees = {"before": Tree(asked.before.resolve()), "now": Tree(HERE.parents[2])}
    result = HERE.parent / "results/jobs_speed.json"
    found: dict[str, Any] = json.loads(result.read_text())["jobs"] if result.exists() else {}
    print("| job | rows | CPU ms a row before | now | times as many rows a CPU second |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/in.npy", np.random.default_rng(0).normal(size=(80, 128)).astype(np.float32))
        words = {"EMBEDDINGS": f"{folder}/in.npy", "CAPTIONER": build_llava(Path(folder) / "captioner")}
        for kind in asked.jobs:
            rows, shard_rows, job = JOBS[kind]
            order = {"rows": rows, "shard_rows": shard_rows, "job": {"job": kind, **filled(job, rows, words)}}
            for tree in trees.values():
                tree.does({**order, "rows": shard_rows})
            spent: dict[str, list[float]] = {name: [] for name in trees}
            for _ in range(asked.rounds):
                for name, tree in trees.items():
                    one = tree.does(order)
                    spent[name].append(1000 * one["cpu_seconds"] / one["rows"])
            before, now = (min(times) for times in spent.values())
            print(f"| `{kind}` | {rows} | {before:.1f} | {now:.1f} | {before / now:.2f} |", flush=True)
            found[kind] = {"rows": rows, "shard_rows": shard_rows, "cpu_ms_a_row": spent}
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=asked.before, capture_output=True)
            note = {"before": commit.stdout.decode().strip(), "load": os.getloadavg()[0], "jobs": found}
            result.write_text(json.dumps(note, indent=1) + "\n")
    for tree in trees.values():
        tree.process.kill()


if __name__ == "__main__":
    main()
