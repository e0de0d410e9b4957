"""The forward step method of exact inversion: small steps against the residual until it is gone.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule

PATIENCE = 20
"""Evaluations without gain before the step size is halved [read]."""


class Descent(NamedTuple):
    """Step size, smallest squared error, and evaluations since, of every row."""

    rate_B: torch.Tensor
    best_B: torch.Tensor
    stalled_B: torch.Tensor


class Exact(Rule[Descent]):
    """Exact inversion's forward step (Hong et al., 2024): z <- z - s (D_t(z) - z_prev), from the DDIM inverse.

    s rises linearly to `rate` over the first `warmup` iterations and halves after 20 without gain.

    Args:
        iterations: At most so many updates a step beyond the DDIM inverse.
        tolerance: A row stops at this summed squared error.
    """

    def __init__(self, iterations: int = 500, rate: float = 0.5, warmup: int = 20, tolerance: float = 1e-3) -> None:
        self.limit, self.rate, self.warmup, self.enough = iterations + 1, rate, warmup, tolerance

    def blank(self, z_BCHW: torch.Tensor) -> Descent:
        rate_B = torch.full((len(z_BCHW),), self.rate, device=z_BCHW.device)
        return Descent(rate_B, torch.full_like(rate_B, torch.inf), torch.zeros_like(rate_B, dtype=torch.int64))

    @property
    def seeks(self) -> bool:
        return self.enough > 0

    def _reached(self, point: Evaluation) -> torch.Tensor:
        return (point.made_B > 1) & (_error(point) <= self.enough)

    def done(self, point: Evaluation) -> torch.Tensor:
        return super().done(point) | self._reached(point)

    def update(self, point: Evaluation, state: Descent) -> tuple[torch.Tensor, Descent]:
        # The first evaluation, at z_prev, only gives the DDIM inverse.
        error_B, start_B = _error(point), point.made_B == 1
        gained_B = error_B < state.best_B
        stalled_B = torch.where(gained_B | start_B, 0, state.stalled_B + 1)
        halve_B = stalled_B >= PATIENCE
        rate_B = torch.where(halve_B, state.rate_B / 2, state.rate_B)
        warm_B = ((point.made_B - 1) / max(self.warmup, 1)).clamp(max=1.0)
        x_BCHW = point.x_BCHW - per_row(rate_B * warm_B, point.x_BCHW) * point.r_BCHW
        x_BCHW = torch.where(per_row(start_B, x_BCHW), point.step.explicit(point.prev_BCHW, point.m_BCHW), x_BCHW)
        x_BCHW = torch.where(per_row(self._reached(point), x_BCHW), point.x_BCHW, x_BCHW)
        best_B = torch.where(gained_B & ~start_B, error_B, state.best_B)
        return x_BCHW, Descent(rate_B, best_B, torch.where(halve_B, 0, stalled_B))


def _error(point: Evaluation) -> torch.Tensor:
    return point.r_BCHW.flatten(1).square().sum(1)
