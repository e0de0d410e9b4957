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


@pytest.mark.parametrize(
    ("value", "name", "said"),
    [
        (37.63, "psnr", "37.6\u202fdB"),
        (31.2, "floor_psnr", "31.2\u202fdB"),
        (2.352e-07, "latent_mse", "2.4 × 10⁻⁷"),
        (0.93512, "ssim", "0.935"),
        (0.9, "ssim", "0.900"),
        (302, "forwards", "302"),
        (1234.5, "score", "1,234"),
        (123.46, "mahalanobis", "123.5"),
        (-0.00066, "seed_mean", "-6.6 × 10⁻⁴"),
        (0.00594, "seconds_per_prompt", "5.94 ms"),
        (None, "psnr", ""),
        (float("nan"), "psnr", "nan"),
        (0.0, "loss", "0"),
        (3e17, "loss", "3.0 × 10¹⁷"),
    ],
)
def test_figures_have_units_and_the_digits_a_person_wants(value: float | None, name: str, said: str) -> None:
    assert amounts.figure(value, name) == said


def test_a_column_of_figures_is_in_one_style() -> None:
    assert amounts.figures([0.001143, 2.352e-07, None], "latent_mse") == ["1.1 × 10⁻³", "2.4 × 10⁻⁷", ""]
    assert amounts.figures([0.845, 4.9e-4], "residual_max") == ["0.845", "4.9 × 10⁻⁴"]
    assert amounts.figures([0.0, 2e-5], "loss") == ["0", "2.0 × 10⁻⁵"]
