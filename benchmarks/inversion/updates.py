"""Updates of LBO's bias that were tried and lost against the safeguarded one (docs/inversion.md): kept to be compared.

Everything but the update is `stages.inversion.lbo.LatentBias`: the forms of the bias, the warm start, the tolerance.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule
from stages.inversion.lbo import DIFFERENTIATE, SEARCH, Fit, LatentBias, line_search
from stages.inversion.settings import LboMethod
from stages.models.schedule import Step

Update = Literal["anderson", "jacobian-free", "gauss-newton", "adam"]


class AndersonBias(LatentBias):
    """Anderson acceleration of x <- g(x) without a safeguard: a row that stalls goes on."""

    def wants_gradient(self, made_B: torch.Tensor, state: Fit) -> None:
        return None

    def next_point(self, point: Evaluation, state: Fit, gained_B: torch.Tensor) -> tuple[torch.Tensor, Fit]:
        state = state._replace(history=state.history.push(point.x_BCHW, point.g_BCHW))
        return state.history.mix().view_as(point.x_BCHW), state

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW


class JacobianFreeBias(LatentBias):
    """x <- x - rate r / scale; the fixed-point iteration at rate 1."""

    rate = 1.0

    def wants_gradient(self, made_B: torch.Tensor, state: Fit) -> None:
        return None

    def next_point(self, point: Evaluation, state: Fit, gained_B: torch.Tensor) -> tuple[torch.Tensor, Fit]:
        return point.x_BCHW - self.rate * point.r_BCHW / point.step.scale, state

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        return point.g_BCHW if self.bias == "input" else x_BCHW


class GradientBias(LatentBias):
    """Base of the updates that need gradients from their first point on. No gradient is begun beyond the budget."""

    patient = False

    @property
    def least(self) -> int:
        return super().least + 1

    def spent(self, point: Evaluation) -> torch.Tensor:
        """Passes made on the fit itself: the output bias's base is not one."""
        return point.made_B - (1 if self.bias == "output" else 0)

    def wants_gradient(self, made_B: torch.Tensor, state: Fit) -> torch.Tensor:
        return ((made_B > 0) | (self.bias == "input")) & (state.mode_B != SEARCH)

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        updated_BCHW = point.g_BCHW if self.bias == "input" else x_BCHW
        return super().result(point, state, updated_BCHW)


class GaussNewtonBias(GradientBias):
    """Steepest descent on |r|^2 / 2 with line search: a gradient (two passes) and a trial (one), in turns."""

    def done(self, point: Evaluation) -> torch.Tensor:
        cost_B = torch.where(self.spent(point) % 3 == 0, 2, 1)
        over_B = (point.residual_B <= self.tolerance) | (point.made_B + cost_B > self.limit)
        return self.beside_base(over_B, point)

    def next_point(self, point: Evaluation, state: Fit, gained_B: torch.Tensor) -> tuple[torch.Tensor, Fit]:
        tried_B = self.spent(point) % 3 == 0
        x_BCHW, state = line_search(
            point, state._replace(mode_B=torch.where(tried_B, SEARCH, DIFFERENTIATE)), point.g_BCHW, ~tried_B
        )
        return x_BCHW, state._replace(mode_B=torch.where(tried_B, DIFFERENTIATE, SEARCH))


class AdamBias(GradientBias):
    """Adam (Kingma and Ba, 2015, algorithm 1) on |r|^2 / 2."""

    rate, betas, eps = 0.01, (0.9, 0.999), 1e-8

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: Fit) -> tuple[torch.Tensor, Fit]:
        x_BCHW, fresh = super().begin(prev_BCHW, step, state)
        zero_BCHW = torch.zeros_like(prev_BCHW)
        return x_BCHW, fresh._replace(slope_BCHW=zero_BCHW, r_BCHW=zero_BCHW)

    def done(self, point: Evaluation) -> torch.Tensor:
        over_B = (point.residual_B <= self.tolerance) | (point.made_B + 2 > self.limit)
        return self.beside_base(over_B, point)

    def next_point(self, point: Evaluation, state: Fit, gained_B: torch.Tensor) -> tuple[torch.Tensor, Fit]:
        # The moments lie where the line search, which Adam has not, keeps its slope and residual.
        if (slope := point.gradient_BCHW) is None:
            return point.x_BCHW, state
        beta1, beta2 = self.betas
        first_BCHW = torch.lerp(state.slope_BCHW, slope, 1 - beta1)
        second_BCHW = state.r_BCHW * beta2 + slope.square() * (1 - beta2)
        count_B = (self.spent(point) // 2).double()
        mean, square = (
            moment / per_row((1 - beta**count_B).float(), moment)
            for moment, beta in ((first_BCHW, beta1), (second_BCHW, beta2))
        )
        x_BCHW = point.x_BCHW - self.rate * mean / (square.sqrt() + self.eps)
        return x_BCHW, state._replace(slope_BCHW=first_BCHW, r_BCHW=second_BCHW)


UPDATES: dict[Update, type[LatentBias]] = {
    "anderson": AndersonBias,
    "jacobian-free": JacobianFreeBias,
    "gauss-newton": GaussNewtonBias,
    "adam": AdamBias,
}


class ComparedLbo(LboMethod):
    """LBO with one of these updates, for a stage made in Python; job files offer none of them."""

    fitted_by: Update

    @model_validator(mode="after")
    def _enough_for_gradients(self) -> ComparedLbo:
        self.rule(1.0)
        return self

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        kind = UPDATES[self.fitted_by]
        return kind(self.bias, self.warm_start, self.limit, self.tolerance_at(guidance), self.window)
