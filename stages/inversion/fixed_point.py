"""Fixed-point inversion: iterate z <- g(z) = (z_prev - weight m(z, t)) / scale, started at z_prev.

AIDI (Pan et al., 2023) and FPI (Meiri et al., 2023): the plain iteration, and AIDI's two accelerations of it. The first
evaluation gives DDIM inversion, so no iterations beyond it are `ddim` for epsilon models.

Legend as in `stages.inversion.engine`; W past iterates; N = C H W.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule, State


class FixedPoint(Rule[State]):
    """z <- g(z).

    Args:
        iterations: Evaluations a step beyond the first. AIDI uses 5, FPI 20.
        tolerance: A row goes on to its next step once the relative residual is at or below it (ours).
    """

    def __init__(self, iterations: int, tolerance: float = 0.0) -> None:
        self.limit, self.tolerance = iterations + 1, tolerance

    def update(self, point: Evaluation, state: State) -> tuple[torch.Tensor, State]:
        return point.g_BCHW, state


class Averaged(FixedPoint[tuple[torch.Tensor]]):
    """z <- (g(z) + g(z before)) / 2: AIDI's empirical acceleration, m = 1 with equal weights."""

    def blank(self, z_BCHW: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.zeros_like(z_BCHW),)

    def update(self, point: Evaluation, state: tuple[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        (before_BCHW,) = state
        first_B = per_row(point.made_B == 1, before_BCHW)
        return torch.where(first_B, point.g_BCHW, (point.g_BCHW + before_BCHW) / 2), (point.g_BCHW,)


class History(NamedTuple):
    """The newest points of every row and their residuals f = g(x) - x, the newest last, and how many there are."""

    x_BWN: torch.Tensor
    f_BWN: torch.Tensor
    count_B: torch.Tensor

    @staticmethod
    def blank(z_BCHW: torch.Tensor, window: int) -> History:
        """No points yet, and room for `window` beside the newest."""
        x_BWN = z_BCHW.new_zeros((len(z_BCHW), window + 1, z_BCHW[0].numel()))
        return History(x_BWN, x_BWN, torch.zeros(len(z_BCHW), dtype=torch.int64, device=z_BCHW.device))

    def push(self, x_BCHW: torch.Tensor, g_BCHW: torch.Tensor) -> History:
        """With the newest pair; the oldest one is forgotten."""
        x_BN, f_BN = x_BCHW.flatten(1), g_BCHW.flatten(1) - x_BCHW.flatten(1)
        x_BWN = torch.cat([self.x_BWN[:, 1:], x_BN[:, None]], 1)
        f_BWN = torch.cat([self.f_BWN[:, 1:], f_BN[:, None]], 1)
        return History(x_BWN, f_BWN, (self.count_B + 1).clamp(max=x_BWN.shape[1]))

    def mix(self) -> torch.Tensor:
        """The next point by Anderson acceleration, type II (Walker and Ni, 2011, equation 2.2): the combination of past
        values g whose combined residual f is smallest; g(x) itself for a row with one pair. (B, N).

        The least-squares problem, at most W unknowns a row, is solved by its normal equations in float64 with columns
        of unit length.
        """
        x_BN, f_BN = self.x_BWN[:, -1], self.f_BWN[:, -1]
        df_BWN = (f_BN[:, None] - self.f_BWN[:, :-1]).double()
        dx_BWN = (x_BN[:, None] - self.x_BWN[:, :-1]).double()
        age_W = torch.arange(df_BWN.shape[1], 0, -1, device=x_BN.device)
        length_BW = df_BWN.norm(dim=2)
        valid_BW = (age_W < self.count_B[:, None]) & (length_BW > 0)
        inverse_BW = valid_BW / length_BW.clamp(min=1e-300)
        unit_BWN = df_BWN * inverse_BW[..., None]
        # Invalid columns are zero: a one on their diagonal gives them the weight 0. The rest is kept from singularity.
        gram_BWW = unit_BWN @ unit_BWN.mT
        gram_BWW.diagonal(dim1=1, dim2=2).add_(torch.ones_like(length_BW).masked_fill_(valid_BW, 1e-9))
        theta_BW = torch.linalg.solve_ex(gram_BWW, unit_BWN @ f_BN.double()[..., None])[0][..., 0] * inverse_BW
        moved_BN = (theta_BW[..., None] * (dx_BWN + df_BWN)).sum(1)
        return (x_BN + f_BN - moved_BN.to(x_BN.dtype)).contiguous()


class Anderson(FixedPoint[History]):
    """AIDI's Anderson acceleration of z <- g(z).

    Args:
        window: Past iterates beside the newest.
    """

    def __init__(self, iterations: int, tolerance: float = 0.0, window: int = 3) -> None:
        super().__init__(iterations, tolerance)
        self.window = window

    def blank(self, z_BCHW: torch.Tensor) -> History:
        return History.blank(z_BCHW, self.window)

    def update(self, point: Evaluation, state: History) -> tuple[torch.Tensor, History]:
        state = state.push(point.x_BCHW, point.g_BCHW)
        return state.mix().view_as(point.x_BCHW), state
