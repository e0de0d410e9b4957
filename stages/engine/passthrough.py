"""Rows that have failed pass by whatever works on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipeline.contract import Row

PAUSE: Row = {"id": "", "status": "failed", "error": "no row: the next one comes later"}
"""No row: the next one comes later, and is not waited for now. Whoever maps rows hands on what is ready, then this very
object, and keeps what is under way (`stages.engine.turns`)."""


def in_batches(rows: Iterable[Row], size: int, work: Callable[[list[Row]], Iterable[Row]]) -> Iterator[Row]:
    """What `work` makes of the rows, at most `size` of them at a time; failed rows come out untouched.

    `work` is never given an empty list or a failed row; a failed row among its results passes on. A batch ends at
    `PAUSE`, and `PAUSE` comes out behind it.
    """
    batch: list[Row] = []
    for row in rows:
        if row is not PAUSE:
            batch.append(row)
            if len(batch) < size:
                continue
        yield from _worked(batch, work)
        batch = []
        if row is PAUSE:
            yield row
    yield from _worked(batch, work)


def _worked(batch: list[Row], work: Callable[[list[Row]], Iterable[Row]]) -> Iterator[Row]:
    good = [row for row in batch if row.get("status") != "failed"]
    yield from (row for row in batch if row.get("status") == "failed")
    if good:
        yield from work(good)
