"""What a run says about itself while it goes on. Rendering is the caller's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["planning", "starting", "running", "finishing", "publishing", "complete", "interrupted", "failed"]


@dataclass(frozen=True)
class Progress:
    """A snapshot, handed to the ``progress`` callback about twice a second and at every event worth a line.

    Attributes:
        phase: What the run is doing.
        rows: Planned rows.
        rows_ok: Rows in committed shards that were processed.
        rows_failed: Rows in committed shards that came out as error rows.
        rows_duplicate: Rows in committed shards that hold what an earlier row holds.
        rows_active: Rows already through the stage in shards not yet committed.
        shards: Planned shards.
        shards_done: Committed shards.
        workers: Workers that are ready.
        workers_wanted: Upper bound of the pool.
        seconds: Since this run started (not counting earlier, resumed runs).
        rows_per_second: Over the last minute.
        seconds_left: Estimate; None before the first rows.
        message: An event: a worker died, a shard was split, a file was set aside ... None for a plain snapshot.
    """

    phase: Phase
    rows: int = 0
    rows_ok: int = 0
    rows_failed: int = 0
    rows_active: int = 0
    shards: int = 0
    shards_done: int = 0
    workers: int = 0
    workers_wanted: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0
    seconds_left: float | None = None
    message: str | None = None
    rows_duplicate: int = 0

    @property
    def rows_done(self) -> int:
        """Rows in committed shards."""
        return self.rows_ok + self.rows_failed + self.rows_duplicate

    @property
    def rows_left(self) -> int:
        return max(0, self.rows - self.rows_done - self.rows_active)
