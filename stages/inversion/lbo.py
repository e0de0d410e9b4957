"""Latent Bias Optimization: a bias a step, fitted to the picture, makes inversion and generation meet.

After "Latent Bias Alignment for High-Fidelity Diffusion Inversion in Real-World Image Reconstruction and Manipulation"
(Chen et al., 2026): a learned, data-dependent latent bias vector at each inversion step. The loss, the updates, the
warm start and the stopping rule are ours.

Both forms of the bias solve D_t(z_t) = z_prev, with g(x) = (z_prev - weight m(x, t)) / scale:

* output: z_t = g(z_prev) + b_t. The first evaluation of a step is DDIM inversion; then b_t is fitted.
* input: z_t = g(z_prev + b_t), and b_t is right when z_prev + b_t = z_t. No evaluation is spent on z_prev itself: with
  a warm start already the first one stands next to the solution, which is why this is the default.

Warm start: a bias is a network output in disguise. The output that the last step ended with, m* = (z_prev - scale z_t)
/ weight, is carried to the next step (`last`), or the last two are extended by a line (`linear`), under the next
step's own coefficients. For the output bias the same is done with m* - m(z_prev, t).

Legend as in `stages.inversion.engine`: `x_BCHW` is the point evaluated, r = D_t(x) - z_prev its residual.
"""

from __future__ import annotations

from typing import Literal

import torch

from stages.engine.adamw import RowAdamW
from stages.engine.slots import per_row
from stages.inversion.engine import Anderson, Look
from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule, Step

Update = Literal["safeguarded", "anderson", "gauss-newton", "adam", "jacobian-free"]
WarmStart = Literal["none", "last", "linear"]

ITERATE, DIFFERENTIATE, SEARCH = range(3)
"""What a row's next evaluation is for: an iterate, the gradient at the best point, a trial along that gradient."""


class LatentBias:
    """The rule of LBO (a `stages.inversion.engine.Rule`).

    Updates of the bias, each row by itself:

    * anderson: Anderson acceleration of x <- g(x).
    * gauss-newton: steepest descent on |r|^2 / 2 with the step length that is exact for a linear residual: one trial
      evaluation gives the residual's change along the gradient (Gauss-Newton in one direction).
    * safeguarded: anderson, but after `patience` evaluations without a new smallest residual the row goes back to its
      best point, takes one gauss-newton step there, and starts Anderson anew.
    * adam: Adam on |r|^2 / 2.
    * jacobian-free: x <- x - rate r / scale; the fixed-point iteration at rate 1.

    Args:
        passes: Most network passes a step; a gradient counts as one more.
        tolerance: A row goes on to its next step once |r| / |z_prev| is at or below it.
        rate: Step size of adam (0.01 when None) and jacobian-free (1).
        window: Past iterates that Anderson combines.
        patience: See safeguarded.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        bias: Literal["output", "input"] = "input",
        update: Update = "safeguarded",
        warm_start: WarmStart = "linear",
        passes: int = 10,
        tolerance: float = 1e-4,
        rate: float | None = None,
        window: int = 3,
        patience: int = 2,
    ) -> None:
        least = (1 if bias == "output" else 0) + (2 if update in ("adam", "gauss-newton") else 1)
        if passes < least:
            raise ValueError(f"passes is {passes}: update {update} with an {bias} bias needs at least {least}")
        self.bias, self.kind, self.warm_start = bias, update, warm_start
        self.passes, self.tolerance, self.patience = passes, tolerance, patience
        self.rate = rate if rate is not None else {"adam": 0.01}.get(update, 1.0)

        def latent() -> torch.Tensor:
            return torch.zeros((slots, *shape), device=device)

        def number() -> torch.Tensor:
            return torch.zeros(slots, dtype=torch.int64, device=device)

        self.memory = Anderson(slots, shape, window, device) if update in ("anderson", "safeguarded") else None
        self.x_BCHW = latent()
        self.adam = RowAdamW(self.x_BCHW, self.rate, weight_decay=0.0) if update == "adam" else None
        # The last step's network output (less m(z_prev) for the output bias), and its predecessor's.
        self.carried = [latent(), latent()]
        self.steps_B, self.made_B, self.stalled_B, self.mode_B = number(), number(), number(), number()
        self.base_BCHW, self.best_BCHW, self.slope_BCHW, self.error_BCHW = latent(), latent(), latent(), latent()
        self.best_B = torch.full((slots,), torch.inf, device=device)
        self.length_B = torch.zeros(slots, device=device)

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        self.steps_B = torch.where(enter_B, torch.where(first_B, 0, self.steps_B + 1), self.steps_B)
        for state_B, value in ((self.made_B, 0), (self.stalled_B, 0), (self.best_B, torch.inf)):
            state_B.masked_fill_(enter_B, value)
        self.mode_B.masked_fill_(enter_B, DIFFERENTIATE if self.kind in ("gauss-newton", "adam") else ITERATE)
        if self.memory is not None:
            self.memory.clear(enter_B)
        if self.adam is not None:
            self.adam.reset(enter_B)
        if self.bias == "output":
            # z_prev needs no gradient: it only gives the base.
            self.mode_B.masked_fill_(enter_B, ITERATE)
            return prev_BCHW
        known_B = per_row(self.steps_B > 0, prev_BCHW)
        if self.warm_start == "none":
            return prev_BCHW
        return torch.where(known_B, step.up(prev_BCHW, self._foreseen()), prev_BCHW)

    def _foreseen(self) -> torch.Tensor:
        """The carried output for the step that begins: zero for a row at its first step."""
        last, before = self.carried
        if self.warm_start == "none":
            return torch.zeros_like(last)
        if self.warm_start == "last":
            return last
        return torch.where(per_row(self.steps_B > 1, last), 2 * last - before, last)

    def asks_gradient(self) -> torch.Tensor | None:
        if self.kind in ("anderson", "jacobian-free"):
            return None
        return self.mode_B == DIFFERENTIATE

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        return (step.down(x_BCHW, m_BCHW) - prev_BCHW).flatten(1).square().sum(1) / 2

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        g_BCHW = look.step.up(look.prev_BCHW, look.m_BCHW)
        error_BCHW = look.step.down(look.x_BCHW, look.m_BCHW) - look.prev_BCHW
        mode_B = torch.where(look.active_B, self.mode_B, -1)
        self.made_B += look.active_B.long() + (mode_B == DIFFERENTIATE).long()
        base_B = look.active_B & (self.made_B == 1) if self.bias == "output" else torch.zeros_like(look.active_B)
        gained_B = look.active_B & ~base_B & (look.residual_B < self.best_B)
        self.best_B = torch.where(gained_B, look.residual_B, self.best_B)
        self.best_BCHW = torch.where(per_row(gained_B, g_BCHW), look.x_BCHW, self.best_BCHW)
        x_BCHW = self._next(look, g_BCHW, error_BCHW, mode_B, base_B, gained_B)
        if bool(base_B.any()):
            x_BCHW = self._from_base(look, g_BCHW, base_B, x_BCHW)
        # What the next evaluation costs: a gradient is one pass more, and is not begun when the budget has no room for
        # it.
        cost_B = torch.where(self.mode_B == DIFFERENTIATE, 2, 1)
        done_B = ~base_B & ((look.residual_B <= self.tolerance) | (self.made_B + cost_B > self.passes))
        # A row that ends on a trial, or in the middle of a bad spell, gives the best point it has seen.
        settled_B = (look.residual_B <= self.best_B) | (mode_B == ITERATE) & (self.stalled_B == 0)
        result_BCHW = torch.where(per_row(settled_B, g_BCHW), self._result(x_BCHW, g_BCHW), self.best_BCHW)
        x_BCHW = torch.where(per_row(done_B, x_BCHW), result_BCHW, x_BCHW)
        self._carry(look, look.active_B & done_B, x_BCHW)
        return x_BCHW, done_B

    def _result(self, x_BCHW: torch.Tensor, g_BCHW: torch.Tensor) -> torch.Tensor:
        """z_t of a row that stops here: the updated point, or what the inversion step makes of the evaluated one."""
        if self.memory is not None:
            return x_BCHW  # Anderson's point is already a mixture of values g
        return g_BCHW if self.bias == "input" else x_BCHW

    def _from_base(self, look: Look, g_BCHW: torch.Tensor, base_B: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The output bias's first point: DDIM inversion plus the bias that was carried over."""
        self.base_BCHW = torch.where(per_row(base_B, g_BCHW), look.m_BCHW, self.base_BCHW)
        foreseen = torch.where(per_row(self.steps_B > 0, g_BCHW), self._foreseen(), 0.0)
        start = look.step.up(look.prev_BCHW, look.m_BCHW + foreseen)
        if self.kind in ("gauss-newton", "adam"):
            self.mode_B.masked_fill_(base_B, DIFFERENTIATE)
        return torch.where(per_row(base_B, start), start, x_BCHW)

    def _carry(self, look: Look, done_B: torch.Tensor, z_BCHW: torch.Tensor) -> None:
        keep = per_row(done_B, z_BCHW)
        ended = (look.prev_BCHW - look.step.scale * z_BCHW) / look.step.weight
        if self.bias == "output":
            ended = ended - self.base_BCHW
        self.carried = [torch.where(keep, ended, self.carried[0]), torch.where(keep, self.carried[0], self.carried[1])]

    def _next(
        self,
        look: Look,
        g_BCHW: torch.Tensor,
        error_BCHW: torch.Tensor,
        mode_B: torch.Tensor,
        base_B: torch.Tensor,
        gained_B: torch.Tensor,
    ) -> torch.Tensor:
        """The point that each row evaluates next, by its update."""
        if self.kind == "jacobian-free":
            return look.x_BCHW - self.rate * error_BCHW / look.step.scale
        if self.adam is not None:
            self.x_BCHW.copy_(look.x_BCHW)
            if look.gradient_BCHW is not None:
                self.adam.step(look.gradient_BCHW, mode_B == DIFFERENTIATE)
            return self.x_BCHW.clone()
        x_BCHW = g_BCHW
        if self.memory is not None:
            self.memory.push(look.x_BCHW, g_BCHW, look.active_B)
            x_BCHW = self.memory.mix().view_as(g_BCHW)
        if self.kind == "anderson":
            return x_BCHW
        return self._gradient_steps(look, error_BCHW, x_BCHW, mode_B, base_B, gained_B)

    def _gradient_steps(
        self,
        look: Look,
        error_BCHW: torch.Tensor,
        x_BCHW: torch.Tensor,
        mode_B: torch.Tensor,
        base_B: torch.Tensor,
        gained_B: torch.Tensor,
    ) -> torch.Tensor:
        differentiated_B, searched_B = mode_B == DIFFERENTIATE, mode_B == SEARCH
        if look.gradient_BCHW is not None and bool(differentiated_B.any()):
            keep = per_row(differentiated_B, x_BCHW)
            self.slope_BCHW = torch.where(keep, look.gradient_BCHW, self.slope_BCHW)
            self.error_BCHW = torch.where(keep, error_BCHW, self.error_BCHW)
            # |r|^2 / |J'r|^2: the exact step when J is a multiple of a rotation.
            steepness_B = look.gradient_BCHW.flatten(1).square().sum(1).clamp(min=1e-30)
            length_B = error_BCHW.flatten(1).square().sum(1) / steepness_B
            self.length_B = torch.where(differentiated_B, length_B, self.length_B)
            trial = look.x_BCHW - per_row(self.length_B, x_BCHW) * self.slope_BCHW
            x_BCHW = torch.where(keep, trial, x_BCHW)
        if bool(searched_B.any()):
            change = self.error_BCHW - error_BCHW
            share_B = (self.error_BCHW * change).flatten(1).sum(1) / change.flatten(1).square().sum(1).clamp(min=1e-30)
            # The trial stands one step length from the start; the best length is `share` of it.
            best = look.x_BCHW + per_row((1 - share_B) * self.length_B, x_BCHW) * self.slope_BCHW
            x_BCHW = torch.where(per_row(searched_B, x_BCHW), best, x_BCHW)
        if self.kind == "gauss-newton":
            following_B = torch.where(differentiated_B, SEARCH, DIFFERENTIATE)
            self.mode_B = torch.where(look.active_B & ~base_B, following_B, self.mode_B)
            return x_BCHW
        iterated_B = (mode_B == ITERATE) & ~base_B
        self.stalled_B = torch.where(
            iterated_B & ~gained_B, self.stalled_B + 1, torch.where(gained_B, 0, self.stalled_B)
        )
        # A gradient costs three passes more: not begun when the budget ends before its trial.
        stuck_B = iterated_B & (self.stalled_B >= self.patience) & (self.made_B + 3 <= self.passes)
        self.mode_B = torch.where(stuck_B, DIFFERENTIATE, self.mode_B)
        self.mode_B = torch.where(differentiated_B, SEARCH, torch.where(searched_B, ITERATE, self.mode_B))
        assert self.memory is not None
        self.memory.clear(stuck_B | searched_B)
        self.stalled_B.masked_fill_(searched_B, 0)
        return torch.where(per_row(stuck_B, x_BCHW), self.best_BCHW, x_BCHW)


@torch.no_grad()
def replay_bias(predict: Predict, schedule: Schedule, path_BSCHW: torch.Tensor, condition: Condition) -> torch.Tensor:
    """What each sampling step has to be given to stay on the inverted path: z_prev - D_t(z_t), shape (B, S, C, H, W).

    Adding it in generation gives the inverted latent back by construction; stored, it is extra state (ours).
    """
    biases = []
    for k in range(len(schedule)):
        step = schedule.at(torch.full((len(path_BSCHW),), k, device=path_BSCHW.device))
        z_BCHW = path_BSCHW[:, k + 1]
        biases.append(path_BSCHW[:, k] - step.down(z_BCHW, predict(z_BCHW, step.t_B, condition)))
    return torch.stack(biases, 1)
