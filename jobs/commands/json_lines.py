"""What a run says as JSON, an object a line, for log collectors. docs/watching.md has the keys."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TextIO

from pipeline.output.progress import Progress

INTERVAL = 10.0


def write(event: str, facts: dict[str, Any], stream: TextIO | None = None) -> None:
    """One line: ``time`` (UTC), ``event``, and what there is to say of it."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
    print(json.dumps(line, ensure_ascii=False), file=stream or sys.stderr, flush=True)


@contextmanager
def shown(stream: TextIO, interval: float = INTERVAL) -> Iterator[Callable[[Progress], None]]:
    """A progress callback: a ``progress`` line at each phase and every `interval` seconds, a ``message`` at events."""
    last_time, last_phase = float("-inf"), ""

    def tell(snapshot: Progress) -> None:
        nonlocal last_time, last_phase
        facts, now = asdict(snapshot), time.monotonic()
        message = facts.pop("message")
        if message is not None:
            write("message", {"message": message, "phase": snapshot.phase}, stream)
        elif snapshot.phase != last_phase or now - last_time >= interval:
            last_time, last_phase = now, snapshot.phase
            write("progress", facts, stream)

    yield tell
