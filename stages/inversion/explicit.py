"""Inversion without iterating: one evaluation of the network a step.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

import torch

from stages.inversion.engine import Evaluation, Rule


class Ddim(Rule[tuple[()]]):
    """DDIM inversion (Song et al., 2021; Dhariwal and Nichol, 2021, F): the noise at z_prev stands in for that at z_t.

    Agrees with diffusers' `DDIMInverseScheduler` without clipping.
    """

    def update(self, point: Evaluation, state: tuple[()]) -> tuple[torch.Tensor, tuple[()]]:
        return point.step.explicit(point.prev_BCHW, point.m_BCHW), state
