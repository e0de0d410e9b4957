"""Diffusion inversion by solving one equation a timestep: find z with D_t(z) = z_prev, from the picture to the noise.

`InversionProblem` is the walk that every seed-only method shares: a row climbs the schedule in its own slot, at its own
pace, and rows at different times share each U-Net call. A `Rule` is a method: where it starts at a step, and what it
does with one more evaluation of the network. The latent bias methods have rules of their own in `stages.inversion.lbo`.

Legend: B slots; `z_BCHW` latents, `x_BCHW` the point that is evaluated, `prev_BCHW` the cleaner latent z_prev that a
step starts from, `m_BCHW` the network's output at x; S steps; W past iterates; N = C H W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from pipeline.contract import Row, failed
from stages.engine.slots import per_row, slot_mask
from stages.engine.stopping import StoppingRule
from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule, Step


@dataclass(frozen=True)
class Look:
    """What is known of every slot after one evaluation of the network.

    Attributes:
        residual_B: |D_t(x) - z_prev| / |z_prev|.
        active_B: Slots that hold a row.
        gradient_BCHW: Gradient of the rule's loss at x, for the rows that asked for it (zero elsewhere).
    """

    x_BCHW: torch.Tensor
    m_BCHW: torch.Tensor
    prev_BCHW: torch.Tensor
    step: Step
    residual_B: torch.Tensor
    active_B: torch.Tensor
    gradient_BCHW: torch.Tensor | None


class Rule(Protocol):
    """One method, for all slots at once."""

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        """The rows of enter_B start a step (those of first_B their first one). Returns the first x for every slot."""

    def asks_gradient(self) -> torch.Tensor | None:
        """Rows whose next evaluation needs the gradient of `loss` (B,); None for none."""

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        """loss_B, differentiable in x."""

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        """The next x, and done_B: rows for which that x is the step's result z_t (it is not evaluated again)."""


class InversionProblem:
    """Rows climb from z_0 to z_T, each in its slot, each at its own time. A `stages.engine.solver.Problem`.

    Rows come with `z` (C, H, W) and `condition` (a dict of tensors without a batch dimension). They leave with `seed`
    (z_T), `residual` (S,): the relative residual at each step's last evaluated point, `forwards` and `backwards`:
    network evaluations and gradients, and, when the path is kept, `path` (S + 1, C, H, W), z_0 first.

    Args:
        predict: The network.
        schedule: The sampler's coefficients.
        rule: Makes the method for a number of slots.
        slots: Rows at once.
        latent_shape: (C, H, W).
        keep_path: Keep every z_t; needed to replay.
    """

    def __init__(
        self,
        predict: Predict,
        schedule: Schedule,
        rule: Callable[[int, tuple[int, int, int], torch.device], Rule],
        *,
        slots: int,
        latent_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        keep_path: bool = False,
    ) -> None:
        self.predict, self.make_rule, self.keep_path = predict, rule, keep_path
        self.device = torch.device(device)
        self.schedule = schedule.to(self.device)
        self.latent_shape = latent_shape
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Forget all rows and allocate anew."""
        self.slots = slots
        self.rows: list[Row | None] = [None] * slots
        self.rule = self.make_rule(slots, self.latent_shape, self.device)
        self.x_BCHW = torch.zeros((slots, *self.latent_shape), device=self.device)
        self.prev_BCHW = torch.zeros_like(self.x_BCHW)
        self.k_B = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.active_B = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.broken_B = torch.zeros_like(self.active_B)
        self.forwards_B = torch.zeros_like(self.k_B)
        self.backwards_B = torch.zeros_like(self.k_B)
        self.residual_BS = torch.zeros((slots, len(self.schedule)), device=self.device)
        self.condition: Condition = {}
        self.path_BSCHW = (
            torch.zeros((slots, len(self.schedule) + 1, *self.latent_shape), device=self.device)
            if self.keep_path
            else None
        )

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        where = torch.as_tensor(slots, device=self.device)
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
        self.prev_BCHW[where] = torch.stack([row["z"] for row in rows]).to(self.device, torch.float32)
        for name in rows[0]["condition"]:
            value = torch.stack([row["condition"][name] for row in rows]).to(self.device)
            if name not in self.condition:
                # An empty slot holds a copy of a real condition: what the network makes of it is thrown away.
                self.condition[name] = value[:1].repeat(self.slots, *([1] * (value.dim() - 1)))
            self.condition[name][where] = value
        for state in (self.k_B, self.forwards_B, self.backwards_B, self.residual_BS, self.broken_B):
            state[where] = 0
        self.active_B[where] = True
        if self.path_BSCHW is not None:
            self.path_BSCHW[where, 0] = self.prev_BCHW[where]
        enter_B = slot_mask(self.slots, slots, self.device)
        self._begin(enter_B, enter_B)

    def _begin(self, enter_B: torch.Tensor, first_B: torch.Tensor) -> None:
        start = self.rule.begin(enter_B, first_B, self.prev_BCHW, self.schedule.at(self.k_B))
        self.x_BCHW = torch.where(per_row(enter_B, start), start, self.x_BCHW)

    def _evaluate(self, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        """m at x for every slot, and the gradient of the rule's loss for the rows that asked for one."""
        asks_B = self.rule.asks_gradient()
        if asks_B is not None:
            asks_B = asks_B & self.active_B
        self.forwards_B += self.active_B
        if asks_B is None or not bool(asks_B.any()):
            with torch.no_grad():
                return self.predict(self.x_BCHW, step.t_B, self.condition), None
        self.backwards_B += asks_B
        if bool((asks_B | ~self.active_B).all()):
            return self._differentiate(slice(None), step)
        # Some rows only: they go by themselves, so that the others don't pay for a backward pass.
        m_BCHW, gradient_BCHW = torch.empty_like(self.x_BCHW), torch.zeros_like(self.x_BCHW)
        with_it, without = asks_B.nonzero().flatten(), (~asks_B).nonzero().flatten()
        m_BCHW[with_it], gradient_BCHW[with_it] = self._differentiate(with_it, step)
        with torch.no_grad():
            m_BCHW[without] = self.predict(self.x_BCHW[without], step.t_B[without], take(self.condition, without))
        return m_BCHW, gradient_BCHW

    def _differentiate(self, which: torch.Tensor | slice, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        part = Step(*(getattr(step, name)[which] for name in Step.__dataclass_fields__))
        with torch.enable_grad():
            x_BCHW = self.x_BCHW[which].detach().clone().requires_grad_(True)
            m_BCHW = self.predict(x_BCHW, part.t_B, take(self.condition, which))
            loss_B = self.rule.loss(x_BCHW, m_BCHW, self.prev_BCHW[which], part)
            (gradient_BCHW,) = torch.autograd.grad(loss_B.sum(), x_BCHW)
        return m_BCHW.detach(), gradient_BCHW

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        step = self.schedule.at(self.k_B)
        m_BCHW, gradient_BCHW = self._evaluate(step)
        error = (step.down(self.x_BCHW, m_BCHW) - self.prev_BCHW).flatten(1).norm(dim=1)
        residual_B = error / self.prev_BCHW.flatten(1).norm(dim=1).clamp(min=1e-12)
        look = Look(self.x_BCHW, m_BCHW, self.prev_BCHW, step, residual_B, self.active_B, gradient_BCHW)
        x_BCHW, done_B = self.rule.update(look)
        self.broken_B |= self.active_B & ~x_BCHW.flatten(1).isfinite().all(dim=1)
        moved_B = self.active_B & done_B & ~self.broken_B
        self.x_BCHW = torch.where(per_row(self.active_B & ~self.broken_B, x_BCHW), x_BCHW, self.x_BCHW)
        self.prev_BCHW = torch.where(per_row(moved_B, x_BCHW), x_BCHW, self.prev_BCHW)
        rows = torch.arange(self.slots, device=self.device)
        self.residual_BS[rows, self.k_B] = torch.where(moved_B, residual_B, self.residual_BS[rows, self.k_B])
        if self.path_BSCHW is not None:
            kept = self.path_BSCHW[rows, self.k_B + 1]
            self.path_BSCHW[rows, self.k_B + 1] = torch.where(per_row(moved_B, kept), x_BCHW, kept)
        last_B = self.k_B == len(self.schedule) - 1
        finished_B = (moved_B & last_B) | self.broken_B
        enter_B = moved_B & ~last_B
        self.k_B += enter_B
        self.active_B = self.active_B & ~finished_B
        if bool(enter_B.any()):
            self._begin(enter_B, torch.zeros_like(enter_B))
        return finished_B

    def unload(self, slots: Sequence[int]) -> list[Row]:
        rows = []
        for slot in slots:
            row = self.rows[slot]
            assert row is not None
            self.rows[slot] = None
            outputs = {
                "seed": self.prev_BCHW[slot].to("cpu", copy=True),
                "residual": self.residual_BS[slot].to("cpu", copy=True),
                "forwards": int(self.forwards_B[slot]),
                "backwards": int(self.backwards_B[slot]),
            }
            if self.path_BSCHW is not None:
                outputs["path"] = self.path_BSCHW[slot].to("cpu", copy=True)
            if bool(self.broken_B[slot]):
                t = self.schedule.t_S[int(self.k_B[slot])].item()
                row = failed(row, f"inversion diverged at time {t:g}: lower the guidance, or use method lbo")
            rows.append({**row, **outputs})
        where = torch.as_tensor(slots, device=self.device)
        self.broken_B[where] = False
        self.active_B[where] = False
        return rows


def take(condition: Condition, which: torch.Tensor | slice) -> Condition:
    """The condition of some rows."""
    return {name: value[which] for name, value in condition.items()}


@torch.no_grad()
def generate(
    predict: Predict,
    schedule: Schedule,
    z_BCHW: torch.Tensor,
    condition: Condition,
    bias_BSCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """DDIM sampling from the seeds z_T down to z_0, all rows in step.

    Args:
        bias_BSCHW: For replay: what is added to each step's result, index 0 next to the picture.
    """
    for k in range(len(schedule) - 1, -1, -1):
        step = schedule.at(torch.full((len(z_BCHW),), k, device=z_BCHW.device))
        z_BCHW = step.down(z_BCHW, predict(z_BCHW, step.t_B, condition))
        if bias_BSCHW is not None:
            z_BCHW = z_BCHW + bias_BSCHW[:, k]
    return z_BCHW


class Ddim:
    """DDIM inversion (Song et al., 2021; Dhariwal and Nichol, 2021, F): the noise at z_prev stands in for the noise at
    z_t.

    One evaluation a step; matches diffusers' `DDIMInverseScheduler` without clipping.
    """

    def __init__(self, slots: int, shape: tuple[int, int, int], device: torch.device) -> None:
        self.done_B = torch.ones(slots, dtype=torch.bool, device=device)

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        return prev_BCHW

    def asks_gradient(self) -> torch.Tensor | None:
        return None

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        raise NotImplementedError("ddim takes no gradient")

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        return look.step.explicit(look.prev_BCHW, look.m_BCHW), self.done_B


class Anderson:
    """Anderson acceleration (type II; Walker and Ni, 2011) of x <- g(x), every slot with a history of its own.

    The next x is the combination of past values g whose combined residual f = g - x is smallest. The least-squares
    problem, at most `window` unknowns a row, is solved by its normal equations in float64 with columns of unit length.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], window: int, device: torch.device) -> None:
        n = 1
        for size in shape:
            n *= size
        self.window = window
        self.x_BWN = torch.zeros((slots, window + 1, n), device=device)
        self.f_BWN = torch.zeros_like(self.x_BWN)
        self.count_B = torch.zeros(slots, dtype=torch.int64, device=device)

    def clear(self, which_B: torch.Tensor) -> None:
        self.count_B.masked_fill_(which_B, 0)

    def push(self, x_BCHW: torch.Tensor, g_BCHW: torch.Tensor, which_B: torch.Tensor) -> None:
        """Append the newest pair of some rows; the oldest one is forgotten."""
        x_BN, g_BN = x_BCHW.flatten(1), g_BCHW.flatten(1)
        keep = which_B.view(-1, 1, 1)
        self.x_BWN = torch.where(keep, torch.cat([self.x_BWN[:, 1:], x_BN[:, None]], 1), self.x_BWN)
        self.f_BWN = torch.where(keep, torch.cat([self.f_BWN[:, 1:], (g_BN - x_BN)[:, None]], 1), self.f_BWN)
        self.count_B = torch.where(which_B, (self.count_B + 1).clamp(max=self.window + 1), self.count_B)

    def mix(self) -> torch.Tensor:
        """The accelerated next x (B, N); g(x) itself for a row with one pair only."""
        x_BN, f_BN = self.x_BWN[:, -1], self.f_BWN[:, -1]
        df_BWN = (f_BN[:, None] - self.f_BWN[:, :-1]).double()
        dx_BWN = (x_BN[:, None] - self.x_BWN[:, :-1]).double()
        age_W = torch.arange(self.window, 0, -1, device=x_BN.device)
        length_BW = df_BWN.norm(dim=2)
        valid_BW = (age_W < self.count_B[:, None]) & (length_BW > 0)
        inverse_BW = torch.where(valid_BW, 1 / length_BW.clamp(min=1e-300), 0.0)
        unit_BWN = df_BWN * inverse_BW[..., None]
        gram_BWW = unit_BWN @ unit_BWN.mT
        # Invalid columns are zero: a one on their diagonal gives them the weight 0. The rest is kept from singularity.
        diagonal_BW = torch.where(valid_BW, 1e-9, 1.0)
        theta_BW = torch.linalg.solve(gram_BWW + torch.diag_embed(diagonal_BW), unit_BWN @ f_BN.double()[..., None])[
            ..., 0
        ]
        theta_BW = theta_BW * inverse_BW
        moved_BN = (theta_BW[..., None] * (dx_BWN + df_BWN)).sum(1)
        return (x_BN + f_BN - moved_BN.to(x_BN.dtype)).contiguous()


class FixedPoint:
    """Fixed-point inversion: iterate z <- (z_prev - psi eps(z, t)) / phi, started at z_prev.

    AIDI (Pan et al., 2023) and FPI (Meiri et al., 2023). The first evaluation gives DDIM inversion, so `iterations` of
    0 is `ddim` for epsilon models. `averaged` (AIDI's empirical acceleration, m = 1 with equal weights) takes the mean
    of g at the last two iterates; `anderson` is AIDI's Anderson acceleration.

    Args:
        iterations: Evaluations a step beyond the first.
        tolerance: A row goes on to its next step once the relative residual is at or below it; 0 never.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        iterations: int,
        tolerance: float = 0.0,
        acceleration: Literal["plain", "averaged", "anderson"] = "plain",
        window: int = 3,
    ) -> None:
        self.stopper = StoppingRule(limit=iterations + 1, absolute=tolerance).start(slots, device)
        self.acceleration = acceleration
        self.memory = Anderson(slots, shape, window, device) if acceleration == "anderson" else None
        self.g_BCHW = torch.zeros((slots, *shape), device=device)

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        self.stopper.reset(enter_B)
        if self.memory is not None:
            self.memory.clear(enter_B)
        return prev_BCHW

    def asks_gradient(self) -> torch.Tensor | None:
        return None

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        raise NotImplementedError("fixed-point takes no gradient")

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        g_BCHW = look.step.up(look.prev_BCHW, look.m_BCHW)
        done_B = self.stopper.update(look.residual_B, look.active_B)
        if self.memory is not None:
            self.memory.push(look.x_BCHW, g_BCHW, look.active_B)
            return self.memory.mix().view_as(g_BCHW), done_B
        if self.acceleration == "plain":
            return g_BCHW, done_B
        first_B = per_row(self.stopper.steps_B == 1, g_BCHW)
        x_BCHW = torch.where(first_B, g_BCHW, (g_BCHW + self.g_BCHW) / 2)
        self.g_BCHW = g_BCHW
        return x_BCHW, done_B


class ReNoise:
    """ReNoise (Garibi et al., 2024): fixed-point iterates, of which the result is a weighted mean.

    With one renoising step the published weights are (.5, .5) at times below 250 and (0, 1) above. For more steps the
    last two iterates take these weights (ours).

    Args:
        renoises: Evaluations a step beyond the first.
        average_below: Times below it take the mean of the last two iterates.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        renoises: int = 1,
        average_below: float = 250,
    ) -> None:
        if renoises < 1:
            raise ValueError(f"renoises is {renoises}: renoise needs at least 1")
        self.stopper = StoppingRule(limit=renoises + 1).start(slots, device)
        self.average_below = average_below
        self.last_BCHW = torch.zeros((slots, *shape), device=device)

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        self.stopper.reset(enter_B)
        return prev_BCHW

    def asks_gradient(self) -> torch.Tensor | None:
        return None

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        raise NotImplementedError("renoise takes no gradient")

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        g_BCHW = look.step.up(look.prev_BCHW, look.m_BCHW)
        done_B = self.stopper.update(look.residual_B, look.active_B)
        average_B = done_B & (look.step.t_B < self.average_below)
        x_BCHW = torch.where(per_row(average_B, g_BCHW), (g_BCHW + self.last_BCHW) / 2, g_BCHW)
        self.last_BCHW = g_BCHW
        return x_BCHW, done_B


class Exact:
    """The forward step method of exact inversion (Hong et al., 2024): z <- z - s (D_t(z) - z_prev) from the DDIM
    inverse.

    s rises linearly to `rate` over the first `warmup` iterations and halves after 20 without gain.

    Args:
        iterations: At most so many updates a step beyond the DDIM inverse.
        tolerance: A row stops at this summed squared error.
    """

    patience = 20

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        iterations: int = 500,
        rate: float = 0.5,
        warmup: int = 20,
        tolerance: float = 1e-3,
    ) -> None:
        self.iterations, self.rate, self.warmup, self.tolerance = iterations, rate, warmup, tolerance
        self.made_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.rate_B = torch.zeros(slots, device=device)
        self.best_B = torch.zeros(slots, device=device)
        self.stalled_B = torch.zeros_like(self.made_B)

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        for state_B, value in (
            (self.made_B, 0),
            (self.rate_B, self.rate),
            (self.best_B, torch.inf),
            (self.stalled_B, 0),
        ):
            state_B.masked_fill_(enter_B, value)
        return prev_BCHW

    def asks_gradient(self) -> torch.Tensor | None:
        return None

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        raise NotImplementedError("exact takes no gradient")

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        residual_BCHW = look.step.down(look.x_BCHW, look.m_BCHW) - look.prev_BCHW
        error_B = residual_BCHW.flatten(1).square().sum(1)
        start_B = self.made_B == 0
        gained_B = error_B < self.best_B
        self.best_B = torch.where(look.active_B & ~start_B & gained_B, error_B, self.best_B)
        stalled_B = torch.where(gained_B | start_B, 0, self.stalled_B + 1)
        halve_B = stalled_B >= self.patience
        rate_B = torch.where(halve_B, self.rate_B / 2, self.rate_B)
        self.rate_B = torch.where(look.active_B, rate_B, self.rate_B)
        self.stalled_B = torch.where(look.active_B, torch.where(halve_B, 0, stalled_B), self.stalled_B)
        warm_B = (self.made_B / max(self.warmup, 1)).clamp(max=1.0)
        moved = look.x_BCHW - per_row(self.rate_B * warm_B, residual_BCHW) * residual_BCHW
        reached_B = ~start_B & (error_B <= self.tolerance)
        x_BCHW = torch.where(per_row(start_B, moved), look.step.explicit(look.prev_BCHW, look.m_BCHW), moved)
        x_BCHW = torch.where(per_row(reached_B, moved), look.x_BCHW, x_BCHW)
        done_B = reached_B | (self.made_B >= self.iterations)
        self.made_B += look.active_B
        return x_BCHW, done_B


class Newton:
    """Guided Newton-Raphson inversion (Samuel et al., 2025) with the true gradient of its scalar objective.

    F(z) = |g(z) - z|_1 + prior / (1 - abar_t) |z - mu|_2 with g the fixed-point map and mu = sqrt(abar_t / abar_prev)
    z_prev the mean of q(z_t | z_prev); each coordinate moves by F / (N dF/dz_i). The quotient is regularised as
    F d / (N (d^2 + eta^2)), since d has zeros (ours; the paper adds a small constant). Of the points evaluated, the one
    with the smallest L1 residual gives the result g(z).

    Args:
        iterations: Newton steps at each timestep; the first starts at z_prev.
        prior: Weight of the guidance towards mu.
        eta: Regularisation of the quotient, in units of the gradient's root mean square.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        iterations: int = 2,
        prior: float = 0.1,
        eta: float = 1.0,
    ) -> None:
        self.iterations, self.prior, self.eta = iterations, prior, eta
        self.made_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.best_B = torch.zeros(slots, device=device)
        self.best_BCHW = torch.zeros((slots, *shape), device=device)
        self.asks_B = torch.ones(slots, dtype=torch.bool, device=device)

    def begin(self, enter_B: torch.Tensor, first_B: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        self.made_B.masked_fill_(enter_B, 0)
        self.best_B.masked_fill_(enter_B, torch.inf)
        return prev_BCHW

    def asks_gradient(self) -> torch.Tensor | None:
        return self.made_B < self.iterations

    def loss(self, x_BCHW: torch.Tensor, m_BCHW: torch.Tensor, prev_BCHW: torch.Tensor, step: Step) -> torch.Tensor:
        mismatch_B = (step.up(prev_BCHW, m_BCHW) - x_BCHW).flatten(1).abs().sum(1)
        offset = (x_BCHW - step.alpha / step.alpha_prev * prev_BCHW).flatten(1)
        # Not a norm at zero distance, where a norm has no gradient.
        distance_B = (offset.square().sum(1) + 1e-12).sqrt()
        return mismatch_B + self.prior / (1 - step.alpha.flatten() ** 2) * distance_B

    def update(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        g_BCHW = look.step.up(look.prev_BCHW, look.m_BCHW)
        mismatch_B = (g_BCHW - look.x_BCHW).flatten(1).abs().sum(1)
        better_B = look.active_B & (mismatch_B < self.best_B)
        self.best_B = torch.where(better_B, mismatch_B, self.best_B)
        self.best_BCHW = torch.where(per_row(better_B, g_BCHW), g_BCHW, self.best_BCHW)
        done_B = self.made_B >= self.iterations
        self.made_B += look.active_B
        if look.gradient_BCHW is None:
            return self.best_BCHW, done_B
        value_B = self.loss(look.x_BCHW, look.m_BCHW, look.prev_BCHW, look.step)
        slope = look.gradient_BCHW
        softening_B = self.eta**2 * slope.flatten(1).square().mean(1).clamp(min=1e-12)
        n = slope[0].numel()
        moved = look.x_BCHW - per_row(value_B, slope) * slope / (n * (slope.square() + per_row(softening_B, slope)))
        return torch.where(per_row(done_B, moved), self.best_BCHW, moved), done_B


def strip(rows: Iterable[Row], names: Sequence[str]) -> Iterator[Row]:
    """Rows without working values that no later part needs."""
    for row in rows:
        yield {name: value for name, value in row.items() if name not in names}
