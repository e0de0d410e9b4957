"""What the borders of shards cost a job: its rows in small shards, on miniature models, by a worker that has as many in
hand as the pool would give it, by one that takes one after the other, and by the stage alone on the same rows. One
process without Ray, one thread a library, in turns. Prints a table and writes borders.json, or borders-KIND.json, to
benchmarks/inversion/results.

    OMP_NUM_THREADS=1 python -m benchmarks.inversion.borders [--rows 192] [--shard-rows 8] [--slots 16] [--rounds 2]
    OMP_NUM_THREADS=1 python -m benchmarks.inversion.borders --kind prompts --rows 512
    OMP_NUM_THREADS=1 python -m benchmarks.inversion.borders --kind decode --rows 80 --shard-rows 10 --slots 8

Kinds: images, prompts (solvers with slots), decode, reference, caption (batches: `--slots` rows each). The captioner is
the tests' own, whose weights are random.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inversion.table import RESULTS
from benchmarks.ovi.setting import machine
from jobs.schema.base import RowJob
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
from stages.engine.solver import Occupancy


def planned(job: RowJob, folder: Path, shard_rows: int) -> tuple[Worker, list[Task]]:
    spec = RunSpec(job.stage(), job.source(), str(folder), shard_rows=shard_rows)
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
    output = Output.open(spec.output)
    return Worker(_worker_job(spec, output, Resources())), [Task.of(shard) for shard in read_shards(output.own)]


def in_hand(worker: Worker, tasks: list[Task], *, apart: bool) -> None:
    """All tasks, as the pool hands them out to a single worker."""
    member = _Member.__new__(_Member)
    member.tasks, member.holds = {}, 0 if apart else worker.holds
    left = tasks[::-1]
    with ThreadPoolExecutor(16) as threads:
        while left or member.tasks:
            while left and (not member.tasks or member.hungry):
                task = left.pop()
                member.tasks[threads.submit(worker.process, task)] = task
            done: set[Future[Any]] = wait(list(member.tasks), return_when=FIRST_COMPLETED).done
            for future in done:
                future.result()
                del member.tasks[future]


def alone(worker: Worker, tasks: list[Task]) -> None:
    """The stage on the same rows, with what reads them but nothing that writes."""
    from pipeline.run.reading import Reading

    def rows() -> Any:
        for item in worker._reader.rows([Reading(task) for task in tasks]):
            if item is not None and isinstance(item[1], list):
                yield from (found.row for found in item[1])

    assert all(row["status"] == "ok" for row in worker.stage(rows()))


@dataclass
class Batches:
    """Of a stage that takes its rows in batches: how many there were, and how many rows they had room for."""

    most: int
    steps: int = 0
    rows: int = 0

    @property
    def share(self) -> float:
        return self.rows / (self.steps * self.most)


BATCHED = {"decode": "_drawn", "reference": "_encode", "caption": "_captioned"}
"""The function of a stage that works on a batch."""


def watched(kind: str, stage: Any, most: int) -> Occupancy | Batches:
    """How full the stage is going to be."""
    if kind == "images":
        return stage._occupancy["lbo"]  # type: ignore[no-any-return]
    if kind == "prompts":
        return stage.spent._occupancy["ovi"]  # type: ignore[no-any-return]
    seen, work = Batches(most), getattr(stage, BATCHED[kind])

    def counted(rows: list[Any]) -> Any:
        seen.steps, seen.rows = seen.steps + 1, seen.rows + len(rows)
        return work(rows)

    setattr(stage, BATCHED[kind], counted)
    return seen


def measured(work: Callable[[], None], rows: int, slots: Occupancy | Batches) -> dict[str, float]:
    spent, begun = time.process_time(), time.perf_counter()
    work()
    spent, begun = time.process_time() - spent, time.perf_counter() - begun
    return {"cpu_seconds": spent, "seconds": begun, "rows_per_cpu_second": rows / spent, "occupancy": slots.share,
            "network_batches": slots.steps}  # fmt: skip


def described(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The job."""
    world = f"micro-world://heldout?rows={asked.rows}"
    pictures = {"path": world, "columns": {"image": "image", "prompt": "caption"}}
    if asked.kind == "images":
        return {
            "job": "invert-images", "input": pictures, "methods": ["lbo"], "steps": asked.steps, "slots": asked.slots,
            "reconstruct": False, "pictures": False,
        }  # fmt: skip
    if asked.kind == "prompts":
        method = {"method": "ovi", "compact": True, "slots": asked.slots}
        source = {"path": world, "columns": {"prompt": "caption"}}
        return {"job": "invert-prompts", "input": source, "methods": [method]}
    if asked.kind == "reference":
        return {"job": "reference", "input": pictures, "encoder": "micro:prior", "batch_size": asked.slots}
    if asked.kind == "caption":
        from tests.support.tiny_captioners import build_llava

        model = build_llava(scratch / "captioner")
        return {"job": "caption", "input": pictures, "model": model, "question": "What is here?", "max_tokens": 12,
                "batch_size": asked.slots}  # fmt: skip
    embeddings = np.random.default_rng(0).normal(size=(asked.rows, 128)).astype(np.float32)
    np.save(scratch / "in.npy", embeddings)
    decode = {"model": "micro:decoder", "steps": asked.steps, "guidance": 1.0, "batch_size": asked.slots}
    return {"job": "decode", "input": {"path": str(scratch / "in.npy")}, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion.borders")
    parser.add_argument("--kind", choices=("images", "prompts", *BATCHED), default="images")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--shard-rows", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"one after the other": [], "in hand together": [], "stage alone": []}
    for _ in range(asked.rounds):
        for name, rounds in found.items():
            with tempfile.TemporaryDirectory() as scratch:
                job = load(described(asked, Path(scratch)))
                assert isinstance(job, RowJob)
                worker, tasks = planned(job, Path(scratch) / "out", asked.shard_rows)
                apart = name == "one after the other"
                if apart:
                    worker._stream._joins = False
                work = partial(alone, worker, tasks)
                if name != "stage alone":
                    work = partial(in_hand, worker, tasks, apart=apart)
                rounds.append(measured(work, asked.rows, watched(asked.kind, worker.stage, asked.slots)))
    best = {name: max(rounds, key=lambda one: one["rows_per_cpu_second"]) for name, rounds in found.items()}
    print("| rows through | batches of the network | slots busy | rows/CPU s |\n|---|---|---|---|")
    for name, one in best.items():
        print(f"| {name} | {one['network_batches']} | {one['occupancy']:.3f} | {one['rows_per_cpu_second']:.2f} |")
    (RESULTS / f"borders{'' if asked.kind == 'images' else f'-{asked.kind}'}.json").write_text(
        json.dumps({"machine": machine(), **vars(asked), "best": best, "all": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
