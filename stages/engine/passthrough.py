"""Rows that have failed pass by whatever works on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipeline.contract import Row, batches


def in_batches(rows: Iterable[Row], size: int, work: Callable[[list[Row]], Iterable[Row]]) -> Iterator[Row]:
    """What `work` makes of the rows, at most `size` of them at a time; failed rows come out untouched.

    `work` is never given an empty list or a failed row; a failed row among its results passes on.
    """
    for batch in batches(rows, size):
        good = [row for row in batch if row.get("status") != "failed"]
        yield from (row for row in batch if row.get("status") == "failed")
        if good:
            yield from work(good)
