"""Progress for people: one live line on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from jobs.commands.errors import printable
from jobs.page.amounts import duration, rate
from pipeline.output.progress import Progress

PLAIN_INTERVAL = 30.0
_BAR = 20


def line(snapshot: Progress) -> str:
    """A snapshot in words."""
    if snapshot.phase in ("planning", "starting") and not snapshot.rows:
        return f"{snapshot.phase} ..."
    settled = snapshot.rows_done + snapshot.rows_active
    share = settled / snapshot.rows if snapshot.rows else 1.0
    at_work = snapshot.phase in ("starting", "running")
    parts = [
        snapshot.phase,
        f"{share:4.0%}  {settled:,}/{snapshot.rows:,} rows",
        f"{snapshot.rows_failed:,} failed" if snapshot.rows_failed else "",
        f"{snapshot.rows_duplicate:,} duplicates" if snapshot.rows_duplicate else "",
        rate(snapshot.rows_per_second) if snapshot.rows_per_second else "",
        f"{duration(snapshot.seconds_left)} left" if snapshot.seconds_left and snapshot.phase == "running" else "",
        f"{snapshot.shards_done:,}/{snapshot.shards:,} shards",
        f"{snapshot.workers}/{snapshot.workers_wanted or snapshot.workers} workers" if at_work else "",
        duration(snapshot.seconds),
    ]
    return "  ".join(part for part in parts if part)


def bar(snapshot: Progress) -> str:
    """Committed rows as full blocks, rows under way as light ones."""
    rows = max(1, snapshot.rows)
    full = round(_BAR * snapshot.rows_done / rows)
    light = min(_BAR - full, round(_BAR * snapshot.rows_active / rows))
    return "█" * full + "▒" * light + "·" * (_BAR - full - light)


@contextmanager
def shown(stream: TextIO | None = None, interval: float = PLAIN_INTERVAL) -> Iterator[Callable[[Progress], None]]:
    """A progress callback that writes to `stream` (standard error), and tidies the terminal at the end."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _live(stream) as callback:
            yield callback
    else:
        yield plain(stream, interval)


def plain(stream: TextIO | None = None, interval: float = PLAIN_INTERVAL) -> Callable[[Progress], None]:
    """A progress callback that prints a line at each phase, at each event, and every `interval` seconds.

    It never goes back over a line, so that notebooks, logs and pipes stay readable.

    Args:
        stream: Left out: standard output, as it is by then.
    """
    last_time, last_phase = float("-inf"), ""

    def write(snapshot: Progress) -> None:
        nonlocal last_time, last_phase
        now = time.monotonic()
        if snapshot.message:
            print(printable(snapshot.message), file=stream or sys.stdout, flush=True)
        elif snapshot.phase != last_phase or now - last_time >= interval:
            last_time, last_phase = now, snapshot.phase
            print(line(snapshot), file=stream or sys.stdout, flush=True)

    return write


@contextmanager
def _live(stream: TextIO) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream)
    with Live(console=console, transient=True, refresh_per_second=4, redirect_stderr=False) as live:

        def write(snapshot: Progress) -> None:
            if snapshot.message:
                console.print(Text(printable(snapshot.message), style="dim"))
                if snapshot.phase == "planning":
                    return
            text = Text(no_wrap=True, overflow="ellipsis")
            text.append(bar(snapshot), style="cyan")
            text.append("  " + line(snapshot))
            live.update(text)

        yield write
