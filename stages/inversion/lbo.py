"""Latent Bias Optimization: a bias a step, fitted to the picture, makes inversion and generation meet.

After "Latent Bias Alignment for High-Fidelity Diffusion Inversion in Real-World Image Reconstruction and Manipulation"
(Chen et al., 2026): a learned, data-dependent latent bias vector at each inversion step. The loss, the update, the warm
start and the stopping rule are ours.

Both forms of the bias solve D_t(z_t) = z_prev, with g(x) = (z_prev - weight m(x, t)) / scale:

* output: z_t = g(z_prev) + b_t. The first evaluation of a step is DDIM inversion; then b_t is fitted.
* input: z_t = g(z_prev + b_t), and b_t is right when z_prev + b_t = z_t. No evaluation is spent on z_prev itself: with
  a warm start already the first one stands next to the solution, which is why this is the default.

Warm start: a bias is a network output in disguise. The output that the last step ended with,
m* = (z_prev - scale z_t) / weight, is the next step's guess (`last`), or the last two are extended by a line
(`linear`), or by as much of that line as would have fitted the last step (`fitted`: m + s (m - m_before), s =
<m - m_before, d> / |d|^2 with d the difference before, between 0 and 1.5; 0 as long as a row has none), under the next
step's own coefficients. For the output bias the same is done with m* - m(z_prev, t).

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule
from stages.inversion.fixed_point import History
from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule, Step

WarmStart = Literal["none", "last", "linear", "fitted"]

IDLE = 1e-4
"""Below this weight of the output, z no longer tells it: rounding z alone moves m* by 1e-3. Ordinary steps: 1e-2."""
MOST = 1.5
"""Of the line that `fitted` goes along at most."""


class Fit(NamedTuple):
    """What LBO remembers of every row.

    Attributes:
        steps_B: Steps that the row has behind it.
        last_BCHW, before_BCHW: m* of the last step (less m(z_prev) for the output bias), and of the one before it.
        share_B: Of the line through them that would have fitted the last step.
        base_BCHW: m(z_prev), for the output bias. This and what follows is of the present step.
        history: Of Anderson acceleration.
        best_B, best_BCHW: The smallest residual, and where it was.
    """

    steps_B: torch.Tensor
    last_BCHW: torch.Tensor
    before_BCHW: torch.Tensor
    share_B: torch.Tensor
    base_BCHW: torch.Tensor
    history: History
    best_B: torch.Tensor
    best_BCHW: torch.Tensor


class LatentBias(Rule[Fit]):
    """LBO with a safeguarded update (ours): Anderson acceleration of x <- g(x), each row by itself. It need not come
    nearer with each pass: a row that ends its step further off than it has been takes its best point. No gradient goes
    through the network.

    Args:
        bias: See above.
        warm_start: Where a step's bias starts.
        passes: Most network passes a step.
        tolerance: A row goes on to its next step once |r| / |z_prev| is at or below it.
        window: Past iterates that Anderson combines.
        told: The network will be shown in generation what it was shown last: z_t is what that evaluation makes of
            z_prev, and not the next point.
    """

    advice = "lower the guidance, take more steps, or use method ddim"

    def __init__(
        self,
        bias: Literal["output", "input"] = "input",
        warm_start: WarmStart = "linear",
        passes: int = 10,
        tolerance: float = 1e-4,
        window: int = 3,
        *,
        told: bool = False,
    ) -> None:
        self.bias, self.warm_start, self.window, self.told = bias, warm_start, window, told
        self.limit, self.tolerance = passes, tolerance
        if passes < self.least:
            raise ValueError(f"passes is {passes}: an {bias} bias needs at least {self.least}")

    @property
    def least(self) -> int:
        """The fewest passes in which a bias can be had: the output bias spends one on its base."""
        return 2 if self.bias == "output" else 1

    def blank(self, z_BCHW: torch.Tensor) -> Fit:
        zero_BCHW, zero_B = torch.zeros_like(z_BCHW), torch.zeros(len(z_BCHW), device=z_BCHW.device)
        count_B, worst_B = zero_B.long(), torch.full_like(zero_B, torch.inf)
        return Fit(
            steps_B=count_B, last_BCHW=zero_BCHW, before_BCHW=zero_BCHW, share_B=zero_B, base_BCHW=zero_BCHW,
            history=History.blank(z_BCHW, self.window), best_B=worst_B, best_BCHW=zero_BCHW,
        )  # fmt: skip

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: Fit) -> tuple[torch.Tensor, Fit]:
        # What is written before it is read stays as it is.
        fresh = state._replace(
            history=state.history._replace(count_B=torch.zeros_like(state.steps_B)),
            best_B=torch.full_like(state.best_B, torch.inf), best_BCHW=torch.zeros_like(state.best_BCHW),
        )  # fmt: skip
        if self.bias == "output" or self.warm_start == "none":
            return prev_BCHW, fresh
        known_B = per_row(state.steps_B > 0, prev_BCHW)
        return torch.where(known_B, step.up(prev_BCHW, self._guess(state)), prev_BCHW), fresh

    def _guess(self, state: Fit) -> torch.Tensor:
        """m* of the step that begins, as the warm start has it: zero at a row's first step."""
        last_BCHW, before_BCHW = state.last_BCHW, state.before_BCHW
        if self.warm_start == "none":
            return torch.zeros_like(last_BCHW)
        if self.warm_start == "last":
            return last_BCHW
        if self.warm_start == "fitted":
            line_BCHW = last_BCHW + per_row(state.share_B, last_BCHW) * (last_BCHW - before_BCHW)
        else:
            line_BCHW = 2 * last_BCHW - before_BCHW
        return torch.where(per_row(state.steps_B > 1, last_BCHW), line_BCHW, last_BCHW)

    def beside_base(self, which_B: torch.Tensor, point: Evaluation) -> torch.Tensor:
        """Some rows, without those whose evaluation is the output bias's base, at z_prev: no point of the fit."""
        return which_B & (point.made_B != 1) if self.bias == "output" else which_B

    def done(self, point: Evaluation) -> torch.Tensor:
        return self.beside_base(super().done(point), point)

    def update(self, point: Evaluation, state: Fit) -> tuple[torch.Tensor, Fit]:
        gained_B = self.beside_base(point.residual_B < state.best_B, point)
        state = state._replace(
            best_B=torch.where(gained_B, point.residual_B, state.best_B),
            best_BCHW=torch.where(per_row(gained_B, point.x_BCHW), point.x_BCHW, state.best_BCHW),
        )
        x_BCHW, state = self.next_point(point, state)
        if self.bias == "output":
            base_B = point.made_B == 1
            start_BCHW = point.step.up(point.prev_BCHW, point.m_BCHW + self._guess(state))
            x_BCHW = torch.where(per_row(base_B, x_BCHW), start_BCHW, x_BCHW)
            state = state._replace(base_BCHW=torch.where(per_row(base_B, x_BCHW), point.m_BCHW, state.base_BCHW))
        x_BCHW = torch.where(per_row(point.done_B, x_BCHW), self.result(point, state, x_BCHW), x_BCHW)
        return x_BCHW, self.ended(point, state, point.done_B, x_BCHW)

    def next_point(self, point: Evaluation, state: Fit) -> tuple[torch.Tensor, Fit]:
        """The update: the point that each row evaluates next."""
        history = state.history.push(point.x_BCHW, point.g_BCHW)
        return history.mix().view_as(point.x_BCHW), state._replace(history=history)

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        """z_t of a row that stops here: the next point, or the best one where this evaluation came out worse."""
        if self.told:
            return point.g_BCHW
        return torch.where(per_row(point.residual_B <= state.best_B, x_BCHW), x_BCHW, state.best_BCHW)

    def residual(self, point: Evaluation, state: Fit) -> torch.Tensor:
        return point.residual_B if self.told else state.best_B

    def ended(self, point: Evaluation, state: Fit, done_B: torch.Tensor, z_BCHW: torch.Tensor) -> Fit:
        """With the step's m* noted for the next one's warm start.

        A step that changes nothing (t = 0 where the chain ends at alpha_0) has the weight 0: every output fits it, and
        the last one evaluated is kept.
        """
        keep, weight = per_row(done_B, z_BCHW), point.step.weight
        idle = weight.abs() < IDLE
        m_BCHW = (point.prev_BCHW - point.step.scale * z_BCHW) / torch.where(idle, 1.0, weight)
        m_BCHW = torch.where(idle, point.m_BCHW, m_BCHW)
        if self.bias == "output":
            m_BCHW = m_BCHW - state.base_BCHW
        if self.warm_start == "fitted":
            state = state._replace(share_B=torch.where(done_B, fitted_share(m_BCHW, state), state.share_B))
        return state._replace(
            steps_B=state.steps_B + done_B, last_BCHW=torch.where(keep, m_BCHW, state.last_BCHW),
            before_BCHW=torch.where(keep, state.last_BCHW, state.before_BCHW),
        )  # fmt: skip


def fitted_share(m_BCHW: torch.Tensor, state: Fit) -> torch.Tensor:
    """share_B of the line through the last two outputs that leads nearest to this one; 0 where there are no two."""
    way_BCHW = (state.last_BCHW - state.before_BCHW).flatten(1)
    along_B = ((m_BCHW - state.last_BCHW).flatten(1) * way_BCHW).sum(1)
    share_B = (along_B / way_BCHW.square().sum(1).clamp(min=1e-30)).clamp(0, MOST)
    return torch.where(state.steps_B > 1, share_B, 0.0)


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
