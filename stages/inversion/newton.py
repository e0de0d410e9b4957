"""Guided Newton-Raphson inversion on a scalar objective.

Legend as in `stages.inversion.engine`; N = C H W.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule
from stages.models.schedule import Step


class Best(NamedTuple):
    """The row's z_0, whether it is known, and, at this step, the smallest objective met and g at that point."""

    z_0_BCHW: torch.Tensor
    known_B: torch.Tensor
    value_B: torch.Tensor
    g_BCHW: torch.Tensor


class Newton(Rule[Best]):
    """Guided Newton-Raphson inversion (RNRI, GNRI; Samuel et al., 2025), as the authors' code has it.

    F(z) = sum_i |g(z) - z|_i + prior / 2 ((g(z) - alpha_t z_0)_i / sigma_t)^2: the fixed-point residual, and the
    negative log of q(z_t | z_0) = N(alpha_t z_0, sigma_t^2) at g(z), without its constant. Each coordinate moves by
    F / (N dF/dz_i), where g(z) counts as a constant: dF/dz_i is -1 or 1, and no gradient of the network is taken. Of
    the points evaluated, the one with the smallest F gives the result g(z).

    The authors work with z_t / alpha_t on SDXL-Turbo; here F is of z_t itself (ours), and a coordinate that has
    arrived, where they divide by zero, stays (ours).

    Args:
        iterations: Evaluations at each timestep; the first is at z_prev. The authors' notebook: 2.
        prior: Weight of the guidance towards q(z_t | z_0). The authors': 0.1.
    """

    def __init__(self, iterations: int = 2, prior: float = 0.1) -> None:
        self.limit, self.prior = iterations, prior

    def blank(self, z_BCHW: torch.Tensor) -> Best:
        worst_B = torch.full((len(z_BCHW),), torch.inf, device=z_BCHW.device)
        zero_BCHW = torch.zeros_like(z_BCHW)
        return Best(zero_BCHW, torch.zeros_like(worst_B, dtype=torch.bool), worst_B, zero_BCHW)

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: Best) -> tuple[torch.Tensor, Best]:
        z_0_BCHW = torch.where(per_row(state.known_B, prev_BCHW), state.z_0_BCHW, prev_BCHW)
        fresh = self.blank(prev_BCHW)
        return prev_BCHW, fresh._replace(z_0_BCHW=z_0_BCHW, known_B=torch.ones_like(fresh.known_B))

    def update(self, point: Evaluation, state: Best) -> tuple[torch.Tensor, Best]:
        assert point.step.alpha is not None
        assert point.step.sigma is not None
        miss_BCHW = point.g_BCHW - point.x_BCHW
        surprise_BCHW = ((point.g_BCHW - point.step.alpha * state.z_0_BCHW) / point.step.sigma).square() / 2
        value_B = (miss_BCHW.abs() + self.prior * surprise_BCHW).flatten(1).mean(1)
        better_B = value_B < state.value_B
        g_BCHW = torch.where(per_row(better_B, point.g_BCHW), point.g_BCHW, state.g_BCHW)
        state = state._replace(value_B=torch.where(better_B, value_B, state.value_B), g_BCHW=g_BCHW)
        moved_BCHW = point.x_BCHW + per_row(value_B, miss_BCHW) * miss_BCHW.sign()
        return torch.where(per_row(point.done_B, moved_BCHW), g_BCHW, moved_BCHW), state
