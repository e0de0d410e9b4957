"""Charts as inline SVG."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from jobs.page import charts
from tests.support.html_page import Page


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7.2), (1e-9, 3e-9), (0, 123456), (5, 5), (0.98, 1.01), (float("nan"), 1)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 8
    if high > low:
        assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) for tick in found)
        digits = {f"{tick:.6e}".partition("e")[0].rstrip("0").rstrip(".") for tick in found}
        assert max(map(len, digits)) <= 5


@pytest.mark.parametrize(
    "values", [[], [float("nan")] * 3, [1.0], [2, 2, 2], [0, 1, 1, 2], np.random.default_rng(0).normal(size=5000)]
)
def test_a_histogram_draws_every_finite_value(values: Any) -> None:
    made = charts.histogram(values, "a <title>")
    Page(made)
    counts = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)</title>", made)]
    assert sum(counts) == int(np.isfinite(np.asarray(values, dtype=float)).sum())
    assert "a &lt;title&gt;" in made


def test_lines_break_where_values_are_missing() -> None:
    made = charts.lines({"a": ([0, 1, 2, 3], [1.0, float("nan"), 2.0, 3.0])}, "t")
    assert made.count("<polyline") == 2
    assert "nan" not in made
    assert charts.lines({}, "t").count("no values") == 1
