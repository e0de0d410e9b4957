"""Inversion without iterating: one evaluation of the network a step.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule
from stages.models.schedule import Step


class Ddim(Rule[tuple[()]]):
    """DDIM inversion (Song et al., 2021; Dhariwal and Nichol, 2021, F): the noise at z_prev stands in for that at z_t.

    Agrees with diffusers' `DDIMInverseScheduler` without clipping.
    """

    def update(self, point: Evaluation, state: tuple[()]) -> tuple[torch.Tensor, tuple[()]]:
        return point.step.explicit(point.prev_BCHW, point.m_BCHW), state


class Last(NamedTuple):
    """The last step's network output of every row, and whether there is one."""

    m_BCHW: torch.Tensor
    known_B: torch.Tensor


class UniInv(Rule[Last]):
    """Uni-Inv (UniEdit-Flow, Jiao et al., ICLR 2026): z_t = g(zb) with zb = (z_prev - weight m_last) / scale, the point
    that the last step's output predicts under this step's coefficients. The first step evaluates at z_prev, as DDIM
    does.
    """

    def blank(self, z_BCHW: torch.Tensor) -> Last:
        return Last(torch.zeros_like(z_BCHW), torch.zeros(len(z_BCHW), dtype=torch.bool, device=z_BCHW.device))

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: Last) -> tuple[torch.Tensor, Last]:
        known_B = per_row(state.known_B, prev_BCHW)
        return torch.where(known_B, step.up(prev_BCHW, state.m_BCHW), prev_BCHW), state

    def update(self, point: Evaluation, state: Last) -> tuple[torch.Tensor, Last]:
        return point.g_BCHW, Last(point.m_BCHW, torch.ones_like(state.known_B))
