"""The updates of LBO's bias that lost."""

from __future__ import annotations

import pytest

from benchmarks.inversion.updates import UPDATES
from stages.inversion.fixed_point import Anderson, FixedPoint
from tests.stages.inversion.test_lbo import invert


@pytest.mark.parametrize("bias", ["output", "input"])
@pytest.mark.parametrize("update", ["anderson", "jacobian-free"])
def test_every_update_comes_nearer_than_ddim_within_its_budget(bias, update) -> None:
    _, ddim, _ = invert(FixedPoint(1))
    _, error, passes = invert(UPDATES[update](bias=bias, passes=12, tolerance=0.0))
    assert error < ddim / 2, (error, ddim)
    assert passes <= 12


def test_a_warm_start_beats_anderson_at_equal_passes() -> None:
    _, anderson, spent = invert(Anderson(2), steps=20)
    _, biased, passes = invert(UPDATES["anderson"](passes=3, tolerance=0.0), steps=20)
    assert passes == spent == 3
    assert biased < anderson
