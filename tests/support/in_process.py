"""Whole runs in this process, without Ray: for tests of what a job writes, however it was spread."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.run import driver


def _compute_here(spec: Any, output: Any, lock: Any, reporter: Any, resources: Any, max_failed: float, address: Any,
                  tally: Any, done: Any, again: Any) -> None:  # fmt: skip
    """One worker in this process, in place of the cluster."""
    from pipeline.output.planfile import read_shards
    from pipeline.run.tasks import Task
    from pipeline.run.worker import Worker

    worker = Worker(driver._worker_job(spec, output, resources))
    for shard in read_shards(output.own):
        if shard.index not in done:
            tally.add(worker.process(Task.of(shard, again.get(shard.index))))


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """From now on `jobs.run.run_job` works in this process (but for chains, which connect to Ray themselves)."""
    patch.setattr(driver, "_compute", _compute_here)
