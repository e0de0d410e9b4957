"""Run a stage over a source on Ray, commit what comes out exactly once, and publish it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pipeline.output import Output
from pipeline.plan import Plan, PlanError, PlanMismatch, RunSpec, make_plan
from pipeline.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = [
    "Calibration", "Finished", "Plan", "PlanError", "PlanMismatch", "Progress", "Resources", "RunError", "RunResult",
    "RunSpec", "calibrate", "make_plan", "run",
]  # fmt: skip


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do (no Ray, no workers ...)."""


@dataclass(frozen=True)
class Resources:
    """What a worker gets, and how many workers there may be. No part of the fingerprint.

    Attributes:
        min_workers: The run starts work as soon as one worker is ready, and says so while fewer than this are.
        max_workers: Upper bound of the pool; None: as many as the cluster holds.
        cpus, gpus, memory: Reserved with Ray for each worker (memory in bytes).
        decode_threads: Threads that read and decode beside the device.
        encode_threads: Threads that encode pictures of the output.
    """

    min_workers: int = 1
    max_workers: int | None = 1
    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    decode_threads: int = 2
    encode_threads: int = 2


@dataclass(frozen=True)
class RunResult:
    """How a run ended. Exit code 0 belongs to ``state == "complete"`` only.

    Attributes:
        output: The output folder.
        state: ``complete``: every planned row is committed and published. ``interrupted``: Ctrl-C; run again to resume.
            ``failed``: too many failed rows, or shards that could not be committed.
        reason: Why it did not complete; None if it did.
        planned, ok, failed: Rows.
        shards: Planned shards; resumed: those that an earlier run had committed.
        seconds: Of this run.
        measures: Numeric stage column -> ``{"n", "mean", "min", "max"}``.
        errors: Commonest reasons of failed rows -> count.
    """

    output: str
    state: Literal["complete", "interrupted", "failed"]
    reason: str | None
    planned: int
    ok: int
    failed: int
    shards: int
    resumed: int
    seconds: float
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """Handed to ``finish`` when all shards are committed, before the dataset is published.

    ``output.open_file(name, "wb")`` writes a further file into the output folder (never below ``data/``).
    """

    output: Output

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The committed shards' tables in shard order, one at a time."""
        return self.output.tables(columns)

    def summaries(self) -> Iterator[dict[str, np.ndarray]]:
        """What the stage's ``take_summary()`` returned, in shard order (a split shard gives several)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Calibration:
    """A timed sample.

    Attributes:
        rows: Rows in the sample.
        build_seconds: To construct the stage.
        seconds: For the sample, after one warm-up row.
        seconds_per_row: On one worker.
        bytes_per_row: Of the encoded output.
        failed: Rows of the sample that failed.
    """

    rows: int
    build_seconds: float
    seconds: float
    seconds_per_row: float
    bytes_per_row: float
    failed: int


def run(
    spec: RunSpec,
    *,
    resources: Resources = Resources(),
    max_failed_fraction: float = 0.1,
    address: str | None = None,
    finish: Callable[[Finished], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    title: str = "latentmill output",
    description: str = "",
) -> RunResult:
    """Plan or resume, dispatch, commit, finish, publish.

    Args:
        spec: What to compute, and where it goes.
        address: A running Ray (``auto``, ``host:port``, ``ray://...``). None: the Ray this process is already
            connected to, else a local one that starts and stops with this call.
        max_failed_fraction: The run stops as soon as more than this share of all planned rows has failed.
        finish: Called once when all shards are committed, before publication. May be called again if it raises.
        progress: Called from this thread only.
        title, description: For the dataset card (Markdown).

    Raises:
        SourceError, PlanError, PlanMismatch: Before anything is written.
        OutputError: The folder holds something else.
        OutputLocked: Another run holds the folder.
        RunError: No Ray, no worker could be had, or the stage cannot be constructed.
    """
    raise NotImplementedError


def calibrate(
    spec: RunSpec, *, rows: int = 64, resources: Resources = Resources(), address: str | None = None
) -> Calibration:
    """Time the first ``rows`` rows through the stage on one worker; writes nothing to the output folder."""
    raise NotImplementedError
