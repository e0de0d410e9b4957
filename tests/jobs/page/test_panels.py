"""The sections that every page has."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.page.panels import throughput
from pipeline.output.commit import Record


def record(shard: int, started: float, seconds: float, rows: int = 10, worker: str = "host:1") -> Record:
    given: dict[str, Any] = {"shard": shard, "attempt": "a", "file": f"{shard}", "size": 1, "checksum": ""}
    return Record(**given, rows_ok=rows, rows_failed=0, started=started, seconds=seconds, worker=worker)


def test_throughput_keeps_the_rows_and_leaves_pauses_out() -> None:
    records = [record(0, 100.0, 10.0), record(1, 105.0, 10.0), record(2, 5000.0, 5.0, rows=50)]
    times, rates, pauses = throughput(records, bins=40)
    width = times[1] - times[0]
    assert pauses == 1
    assert times[-1] + width / 2 == pytest.approx(20.0)  # 15 s and 5 s at work
    assert sum(rates) * width == pytest.approx(70.0)
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(10.0)
    assert throughput([]) == ([], [], 0)
