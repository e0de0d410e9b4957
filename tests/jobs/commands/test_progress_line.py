"""Progress for people: plain lines, and one live line on a terminal."""

from __future__ import annotations

import io

from jobs.commands import progress_line
from pipeline.output.progress import Progress


def test_plain_progress_is_a_line_at_each_phase_and_each_event() -> None:
    stream = io.StringIO()
    with progress_line.shown(stream, interval=1000) as write:
        write(Progress("running", rows=10, rows_ok=5, shards=2, shards_done=1, workers=1, workers_wanted=2))
        write(Progress("running", rows=10, rows_ok=6, shards=2, shards_done=1, workers=1, workers_wanted=2))
        write(Progress("running", rows=10, message="a worker died"))
        write(Progress("complete", rows=10, rows_ok=9, rows_failed=1, shards=2, shards_done=2))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["running", "50%", "5/10", "rows", "1/2", "shards", "1/2", "workers", "0.0", "s"]
    assert lines[1] == "a worker died"
    assert lines[2].startswith("complete  100%  10/10 rows  1 failed")


def test_the_live_line_is_one_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress_line.shown(stream) as write:
        for done in range(10):
            write(Progress("running", rows=10, rows_ok=done, shards=1, rows_per_second=3.0, seconds_left=2.0))
    assert stream.getvalue().count("\n") <= 1
