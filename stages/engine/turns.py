"""Rows of one stream that go several ways, each of which holds rows of its own: the ways are driven in turns, so that
none runs empty while rows come (ours).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from pipeline.contract import Row
from stages.engine.passthrough import PAUSE


def in_turns(
    rows: Iterable[Row], ways: Mapping[str, Callable[[Iterable[Row]], Iterator[Row]]], of: Callable[[Row], str],
    most: int,
) -> Iterator[tuple[str, Row]]:  # fmt: skip
    """What becomes of the rows, with the way that each came out of.

    A way that asks for a row takes rows off the stream until one of its own comes; those of the others wait. Once
    `most` wait and none is its own, it is stopped as it is, its slots full, and the way with most rows waiting goes on.

    Args:
        rows: Read lazily.
        ways: Map rows to rows, and hand on `PAUSE`, as `in_batches` and `solve` do.
        of: Which way a row goes.
        most: Rows that may wait, 1 at least.
    """
    source = iter(rows)
    waiting: dict[str, deque[Row]] = {name: deque() for name in ways}
    ended = False

    def fed(name: str) -> Iterator[Row]:
        nonlocal ended
        own = waiting[name]
        while own or not ended:
            if own:
                yield own.popleft()
            elif sum(map(len, waiting.values())) >= most:
                yield PAUSE
            elif (row := next(source, None)) is None:
                ended = True
            else:
                waiting[of(row)].append(row)

    under_way = {name: way(fed(name)) for name, way in ways.items()}
    while under_way:
        name = max(under_way, key=lambda name: len(waiting[name]))
        for row in under_way[name]:
            if row is PAUSE:
                break
            yield name, row
        else:
            del under_way[name]
