"""Whole runs in this process, without Ray: for tests of what a job writes, however it was spread."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.run import driver


def _compute_here(spec: Any, output: Any, lock: Any, reporter: Any, resources: Any, max_failed: float, address: Any,
                  found: Any) -> None:  # fmt: skip
    """One worker in this process, in place of the cluster."""
    from pipeline.run.worker import Worker

    worker = Worker(driver._worker_job(spec, output, resources))
    for task in found.tasks(output):
        found.tally.add(worker.process(task))


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """From now on `jobs.run.run_job` works in this process (but for chains, which connect to Ray themselves)."""
    patch.setattr(driver, "_compute", _compute_here)
