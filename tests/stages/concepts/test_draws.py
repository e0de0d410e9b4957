"""The random numbers of a learning step."""

from __future__ import annotations

import math

import torch

from stages.concepts.draws import draw, skewed
from stages.concepts.settings import LegoSettings


def test_draws_are_balanced_replayable_and_skewed_as_asked():
    settings = LegoSettings(pictures=4)
    shown = torch.tensor([True, True, True, False, False])
    seen = torch.cat([draw(settings, 0, "x", s, shown, (1, 1, 1), 1000).picture_K for s in range(300)])
    assert (seen.view(-1, 4)[:, :2] < 3).all()
    assert (seen.view(-1, 4)[:, 2:] >= 3).all()
    assert torch.bincount(seen).tolist()[3:] == [300, 300]  # two of two in each step
    again = draw(settings, 0, "x", 5, shown, (1, 1, 1), 1000)
    assert torch.equal(again.noise_KCHW, draw(settings, 0, "x", 5, shown, (1, 1, 1), 1000).noise_KCHW)
    assert not torch.equal(again.noise_KCHW, draw(settings, 0, "y", 5, shown, (1, 1, 1), 1000).noise_KCHW)
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    x = skewed(u, 0.5)
    assert torch.allclose(
        x - 0.5 * torch.sin(math.pi * x) / math.pi, u, atol=1e-9
    )  # the inverse of the distribution function
