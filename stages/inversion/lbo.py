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

ITERATE, DIFFERENTIATE, SEARCH = range(3)
"""What a row's next evaluation is for: an iterate, the gradient at the best point, a trial along that gradient."""
IDLE = 1e-4
"""Below this weight of the output, z no longer tells it: rounding z alone moves m* by 1e-3. Ordinary steps: 1e-2."""
MOST = 1.5
"""Of the line that `fitted` goes along at most."""
PATIENCE = 2
"""Evaluations without a new smallest residual before a row takes a gradient step."""


class Fit(NamedTuple):
    """What LBO remembers of every row.

    Attributes:
        steps_B: Steps that the row has behind it.
        last_BCHW, before_BCHW: m* of the last step (less m(z_prev) for the output bias), and of the one before it.
        share_B: Of the line through them that would have fitted the last step.
        base_BCHW: m(z_prev), for the output bias. This and what follows is of the present step.
        history: Of Anderson acceleration.
        best_B, best_BCHW: The smallest residual, and where it was.
        mode_B: What the next evaluation is for.
        stalled_B: Iterates since the smallest residual.
        slope_BCHW, r_BCHW, length_B: Gradient, residual and step length of the row's gradient step.
    """

    steps_B: torch.Tensor
    last_BCHW: torch.Tensor
    before_BCHW: torch.Tensor
    share_B: torch.Tensor
    base_BCHW: torch.Tensor
    history: History
    best_B: torch.Tensor
    best_BCHW: torch.Tensor
    mode_B: torch.Tensor
    stalled_B: torch.Tensor
    slope_BCHW: torch.Tensor
    r_BCHW: torch.Tensor
    length_B: torch.Tensor


class LatentBias(Rule[Fit]):
    """LBO with a safeguarded update (ours): Anderson acceleration of x <- g(x), each row by itself; a row without
    progress goes back to its best point, takes one gradient step with line search there, and starts Anderson anew.

    Args:
        bias: See above.
        warm_start: Where a step's bias starts.
        passes: Most network passes a step; a gradient counts as one more.
        tolerance: A row goes on to its next step once |r| / |z_prev| is at or below it.
        window: Past iterates that Anderson combines.
        told: The network will be shown in generation what it was shown last: z_t is what that evaluation makes of
            z_prev, and not the next point.
    """

    advice = "lower the guidance, take more steps, or use method ddim"
    patient = True

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
            mode_B=torch.full_like(count_B, ITERATE), stalled_B=count_B, slope_BCHW=zero_BCHW, r_BCHW=zero_BCHW,
            length_B=zero_B,
        )  # fmt: skip

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: Fit) -> tuple[torch.Tensor, Fit]:
        # What is written before it is read stays as it is.
        fresh = state._replace(
            history=state.history._replace(count_B=torch.zeros_like(state.steps_B)),
            best_B=torch.full_like(state.best_B, torch.inf), best_BCHW=torch.zeros_like(state.best_BCHW),
            mode_B=torch.full_like(state.mode_B, ITERATE), stalled_B=torch.zeros_like(state.stalled_B),
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

    def wants_gradient(self, made_B: torch.Tensor, state: Fit) -> torch.Tensor | None:
        return state.mode_B == DIFFERENTIATE

    def done(self, point: Evaluation) -> torch.Tensor:
        return self.beside_base(super().done(point), point)

    def update(self, point: Evaluation, state: Fit) -> tuple[torch.Tensor, Fit]:
        done_B = point.counted(point.done_B)
        gained_B = point.counted(self.beside_base(point.residual_B < state.best_B, point))
        state = state._replace(
            best_B=torch.where(gained_B, point.residual_B, state.best_B),
            best_BCHW=torch.where(per_row(gained_B, point.x_BCHW), point.x_BCHW, state.best_BCHW),
        )
        x_BCHW, state = self.next_point(point, state, gained_B)
        if self.bias == "output":
            base_B = point.made_B == 1
            start_BCHW = point.step.up(point.prev_BCHW, point.m_BCHW + self._guess(state))
            x_BCHW = torch.where(per_row(base_B, x_BCHW), start_BCHW, x_BCHW)
            state = state._replace(base_BCHW=torch.where(per_row(base_B, x_BCHW), point.m_BCHW, state.base_BCHW))
        x_BCHW = torch.where(per_row(done_B, x_BCHW), self.result(point, state, x_BCHW), x_BCHW)
        return x_BCHW, self.ended(point, state, done_B, x_BCHW)

    def next_point(self, point: Evaluation, state: Fit, gained_B: torch.Tensor) -> tuple[torch.Tensor, Fit]:
        """The safeguarded update: the point that each row evaluates next."""
        history = state.history.push(point.x_BCHW, point.g_BCHW)
        asked_B, iterated_B = state.mode_B == DIFFERENTIATE, self.beside_base(state.mode_B == ITERATE, point)
        served_B = point.counted(asked_B)
        x_BCHW, state = line_search(point, state, history.mix().view_as(point.x_BCHW), served_B)
        stalled_B = (state.stalled_B + iterated_B).masked_fill_(gained_B, 0)
        # A gradient costs three passes with its trial: not begun when the budget ends before that.
        stuck_B = iterated_B & (stalled_B >= PATIENCE) & (point.made_B + 3 <= self.limit)
        following_B = (stuck_B | asked_B).long()  # ITERATE or DIFFERENTIATE
        if point.gradient_BCHW is not None:
            following_B = following_B.masked_fill_(served_B, SEARCH)
        anew_B = stuck_B
        if point.after_gradient:
            searched_B = state.mode_B == SEARCH
            stalled_B, anew_B = stalled_B.masked_fill_(searched_B, 0), stuck_B | searched_B
        x_BCHW = torch.where(per_row(stuck_B, x_BCHW), state.best_BCHW, x_BCHW)
        return x_BCHW, state._replace(mode_B=following_B, stalled_B=stalled_B, history=history.forget(anew_B))

    def result(self, point: Evaluation, state: Fit, x_BCHW: torch.Tensor) -> torch.Tensor:
        """z_t of a row that stops here: the next point, or the best one where this evaluation came out worse."""
        if self.told:
            return point.g_BCHW
        return torch.where(per_row(point.residual_B <= state.best_B, x_BCHW), x_BCHW, state.best_BCHW)

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


def line_search(
    point: Evaluation, state: Fit, x_BCHW: torch.Tensor, differentiated_B: torch.Tensor
) -> tuple[torch.Tensor, Fit]:  # fmt: skip
    """Steepest descent on |r|^2 / 2 with the step length that is exact for a linear residual: one trial evaluation
    gives the residual's change along the gradient (Gauss-Newton in one direction; ours).

    Returns:
        x with, for rows that were differentiated, the trial point, and for rows that were on trial the best point on
        the line; and what the trial needs.
    """
    if point.after_gradient:  # else no row is on trial
        change = state.r_BCHW - point.r_BCHW
        share_B = (state.r_BCHW * change).flatten(1).sum(1) / change.flatten(1).square().sum(1).clamp(min=1e-30)
        # The trial stands one step length from the start; the best length is `share` of it.
        best_BCHW = point.x_BCHW + per_row((1 - share_B) * state.length_B, x_BCHW) * state.slope_BCHW
        x_BCHW = torch.where(per_row(state.mode_B == SEARCH, x_BCHW), best_BCHW, x_BCHW)
    if (slope_BCHW := point.gradient_BCHW) is None:
        return x_BCHW, state
    # |r|^2 / |J'r|^2: the exact step when J is a multiple of a rotation.
    steepness_B = slope_BCHW.flatten(1).square().sum(1)
    length_B = point.r_BCHW.flatten(1).square().sum(1) / steepness_B.clamp(min=1e-30)
    length_B = torch.where(steepness_B == 0, 0.0, length_B)  # a gradient that overflowed leads nowhere
    keep = per_row(differentiated_B, x_BCHW)
    x_BCHW = torch.where(keep, point.x_BCHW - per_row(length_B, x_BCHW) * slope_BCHW, x_BCHW)
    return x_BCHW, state._replace(
        slope_BCHW=torch.where(keep, slope_BCHW, state.slope_BCHW),
        r_BCHW=torch.where(keep, point.r_BCHW, state.r_BCHW),
        length_B=torch.where(differentiated_B, length_B, state.length_B),
    )


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
