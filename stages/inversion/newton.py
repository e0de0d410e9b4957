"""Guided Newton-Raphson inversion on a scalar objective.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule
from stages.models.schedule import Step


class Best(NamedTuple):
    """The smallest L1 residual that a row has met at this step, and g at that point."""

    mismatch_B: torch.Tensor
    g_BCHW: torch.Tensor


class Newton(Rule[Best]):
    """Guided Newton-Raphson inversion (RNRI, GNRI; Samuel et al., 2025) with the true gradient of its objective.

    F(z) = |g(z) - z|_1 + prior / (1 - abar_t) |z - mu|_2 with mu = sqrt(abar_t / abar_prev) z_prev the mean of
    q(z_t | z_prev); each coordinate moves by F / (N dF/dz_i). The quotient is regularised as F d / (N (d^2 + eta^2)),
    since d has zeros (ours; the paper adds a small constant). Of the points evaluated, the one with the smallest L1
    residual gives the result g(z).

    Args:
        iterations: Newton steps at each timestep; the first starts at z_prev.
        prior: Weight of the guidance towards mu.
        eta: Regularisation of the quotient, in units of the gradient's root mean square.
    """

    def __init__(self, iterations: int = 2, prior: float = 0.1, eta: float = 1.0) -> None:
        self.limit, self.prior, self.eta = 2 * iterations + 1, prior, eta

    def blank(self, z_BCHW: torch.Tensor) -> Best:
        return Best(torch.full((len(z_BCHW),), torch.inf, device=z_BCHW.device), torch.zeros_like(z_BCHW))

    def wants_gradient(self, made_B: torch.Tensor, state: Best) -> torch.Tensor:
        return made_B < self.limit - 1

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        mismatch_B = (step.up(prev_BCHW, m_BCHW) - x_BCHW).flatten(1).abs().sum(1)
        offset = (x_BCHW - step.alpha / step.alpha_prev * prev_BCHW).flatten(1)
        # Not a norm at zero distance, where a norm has no gradient.
        distance_B = (offset.square().sum(1) + 1e-12).sqrt()
        return mismatch_B + self.prior / (1 - step.alpha.flatten() ** 2) * distance_B

    def update(self, point: Evaluation, state: Best) -> tuple[torch.Tensor, Best]:
        mismatch_B = (point.g_BCHW - point.x_BCHW).flatten(1).abs().sum(1)
        better_B = mismatch_B < state.mismatch_B
        g_BCHW = torch.where(per_row(better_B, point.g_BCHW), point.g_BCHW, state.g_BCHW)
        state = Best(torch.where(better_B, mismatch_B, state.mismatch_B), g_BCHW)
        if (slope := point.gradient_BCHW) is None:
            return g_BCHW, state
        value_B = self.loss(point.x_BCHW, point.m_BCHW, point.prev_BCHW, point.step)
        softening_B = self.eta**2 * slope.flatten(1).square().mean(1).clamp(min=1e-12)
        n = slope[0].numel()
        moved = point.x_BCHW - per_row(value_B, slope) * slope / (n * (slope.square() + per_row(softening_B, slope)))
        return torch.where(per_row(self.done(point), moved), g_BCHW, moved), state
