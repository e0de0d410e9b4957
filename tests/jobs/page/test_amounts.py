"""Amounts in words."""

from __future__ import annotations

import pytest

from jobs.page import amounts


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.21, "4.2 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (273600, "3 d 04 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert amounts.duration(seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [(8.3e-5, "83 us"), (0.00594, "5.94 ms"), (5.86, "5.9 s")])
def test_a_row_s_time_has_its_unit(seconds: float, said: str) -> None:
    assert amounts.short(seconds) == said
