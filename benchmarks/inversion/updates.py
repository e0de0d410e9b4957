"""Updates of LBO's bias that were tried and lost against the safeguarded one (docs/inversion.md): kept to be compared.

Everything but the update is `stages.inversion.lbo.LatentBias`: the forms of the bias, the warm start, the tolerance.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from stages.inversion.engine import Evaluation, Rule
from stages.inversion.lbo import Fit, LatentBias
from stages.inversion.settings import LboMethod

Update = Literal["anderson", "jacobian-free"]


class AndersonBias(LatentBias):
    """Anderson acceleration of x <- g(x) without a safeguard: a row ends its step wherever its last pass leads."""

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW

    def residual(self, point: Evaluation, state: Fit) -> torch.Tensor:
        return point.residual_B


class JacobianFreeBias(AndersonBias):
    """x <- x - rate r / scale; the fixed-point iteration at rate 1."""

    rate = 1.0

    def next_point(self, point: Evaluation, state: Fit) -> tuple[torch.Tensor, Fit]:
        return point.x_BCHW - self.rate * point.r_BCHW / point.step.scale, state

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        return point.g_BCHW if self.bias == "input" else x_BCHW


UPDATES: dict[Update, type[LatentBias]] = {"anderson": AndersonBias, "jacobian-free": JacobianFreeBias}


class ComparedLbo(LboMethod):
    """LBO with one of these updates, for a stage made in Python; job files offer none of them."""

    fitted_by: Update

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        kind = UPDATES[self.fitted_by]
        return kind(self.bias, self.warm_start, self.limit, self.tolerance_at(guidance), self.window)
