"""Diffusion inversion by solving one equation a timestep: find z with D_t(z) = z_prev, from the picture to the noise.

A `Walk` is what every method without extra state shares: a row goes from equation to equation in its own slot, at its
own pace, and rows at different times share each U-Net call. `InversionProblem` walks up a schedule step by step;
`stages.inversion.sweeps` has the walk of samplers whose steps hang together. A `Rule` is a method: where it starts at a
step, and what it does with one more evaluation of the network. The walk keeps a rule's state, starts it afresh where
rows enter a step, counts passes and ends steps; a rule only computes, for all slots as if each held a row.

Legend: B slots; `z_BCHW` latents, `x_BCHW` the point that is evaluated, `prev_BCHW` the cleaner latent z_prev that a
step starts from, `m_BCHW` the network's output at x, `r_BCHW` = D_t(x) - z_prev the residual, `g_BCHW` the fixed-point
map at x; S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar, cast

import torch

from pipeline.contract import Row, failed
from stages.engine.device import sent
from stages.engine.slots import held, per_row, slot_mask
from stages.inversion.recorded import RecordedStep
from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule, Step


@dataclass(frozen=True)
class Evaluation:
    """What is known of every slot after one evaluation of the network.

    Attributes:
        rule: Whose point it is.
        residual_B: |r| / |z_prev|.
        made_B: Passes that each row has made at this step, this evaluation included.
        stagnant_B: Rows whose residual lies in the noise of the network's type and has ceased to fall; None: no row's.
    """

    rule: Rule[Any]
    x_BCHW: torch.Tensor
    m_BCHW: torch.Tensor
    prev_BCHW: torch.Tensor
    step: Step
    r_BCHW: torch.Tensor
    residual_B: torch.Tensor
    made_B: torch.Tensor
    stagnant_B: torch.Tensor | None = None

    @cached_property
    def g_BCHW(self) -> torch.Tensor:
        """(z_prev - weight m(x, t)) / scale, whose fixed point solves the step."""
        return self.step.up(self.prev_BCHW, self.m_BCHW)

    @cached_property
    def done_B(self) -> torch.Tensor:
        """Rows for which it is their step's last, as the rule says."""
        return self.rule.done(self)


State = TypeVar("State", bound=tuple[Any, ...])
"""What a rule remembers of every slot: a tuple, named or not, of tensors (B, ...) and of such tuples."""


class Rule(Generic[State]):
    """One method, for all slots at once. A rule without a state of its own says where it goes next, and no more.

    Attributes:
        limit: Most passes a row makes at a step.
        tolerance: A row goes on to its next step once its relative residual is at or below it; None: never before the
            limit.
        advice: What a user can do about a row that this method cannot invert.
        checks: A step's last evaluation is at the step's own time, so that it gives a residual of the step; rows of a
            rule without it leave with none.
    """

    limit: int = 1
    tolerance: float | None = None
    advice: str = "lower the guidance, or use method lbo"
    checks: bool = True

    def blank(self, z_BCHW: torch.Tensor) -> State:
        """The state that rows start with; z only gives number, shape and device."""
        return cast(State, ())

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: State) -> tuple[torch.Tensor, State]:
        """Rows start a step: the first x, and the state afresh. `state` is what the last step left."""
        return prev_BCHW, self.blank(prev_BCHW)

    def time(self, step: Step, made_B: torch.Tensor, state: State) -> torch.Tensor:
        """t_B that the network is told in the next evaluation, after `made_B` at this step."""
        return step.t_B

    def done(self, point: Evaluation) -> torch.Tensor:
        """done_B: rows for which this evaluation is the step's last."""
        over_B = point.made_B >= self.limit
        if self.tolerance is not None:
            over_B = over_B | (point.residual_B <= self.tolerance)
        return over_B | point.stagnant_B if self.seeks and point.stagnant_B is not None else over_B

    @property
    def seeks(self) -> bool:
        """Whether a step goes on until something is reached, and not for a number of passes."""
        return bool(self.tolerance)

    @property
    def fewest(self) -> int:
        """The fewest evaluations that a row makes at a step."""
        return 1 if self.seeks else self.limit

    def update(self, point: Evaluation, state: State) -> tuple[torch.Tensor, State]:
        """The next x, and the next state. For rows that are `done` that x is the result z_t."""
        raise NotImplementedError

    def residual(self, point: Evaluation, state: State) -> torch.Tensor:
        """residual_B that rows which are `done` leave their step with, after `update`."""
        return point.residual_B


def choose(which_B: torch.Tensor, new: State, old: State) -> State:
    """The new state for some rows, the old one for the others."""
    return cast(State, _choose(which_B, new, old))


def _choose(which_B: torch.Tensor, new: Any, old: Any) -> Any:
    if new is old:
        return old
    if isinstance(new, torch.Tensor):
        return torch.where(which_B if new.dim() == 1 else per_row(which_B, new), new, old)
    parts = tuple(_choose(which_B, *pair) for pair in zip(new, old, strict=True))
    return new._make(parts) if hasattr(new, "_make") else parts


class Walk(Generic[State]):
    """Rows solve one equation after another, each in its slot, each at its own one. A `stages.engine.solver.Problem`.

    What the equations are, and which comes next, is a subclass's. Rows come with `z` (C, H, W) and `condition` (a dict
    of tensors without a batch dimension). They leave with `noise` (z_T), `residual` (S,): the relative residual that
    each equation was left with, at a point that was evaluated, and `forwards`: network evaluations.

    Args:
        predict: The network.
        t_S: What it is told as the time in each equation, the one next to the picture first.
        rule: The method.
        slots: Rows at once.
        latent_shape: (C, H, W).
        noise: Relative residual below which rounding in the network may be all there is. A row below it whose residual
            has not fallen by 30 % in two evaluations is stagnant: a rule that seeks less ends the step there.
    """

    def __init__(
        self,
        predict: Predict,
        t_S: torch.Tensor,
        rule: Rule[State],
        *,
        slots: int,
        latent_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        noise: float = 0.0,
    ) -> None:
        self.predict, self.t_S, self.rule, self.noise = predict, t_S, rule, noise
        self.device = torch.device(device)
        self.latent_shape = latent_shape
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Forget all rows and allocate anew."""
        self.slots = slots
        self.rows: list[Row | None] = [None] * slots
        self.x_BCHW = torch.zeros((slots, *self.latent_shape), device=self.device)
        self.prev_BCHW = torch.zeros_like(self.x_BCHW)
        self.state = self.rule.blank(self.x_BCHW)
        self.all_B = torch.arange(slots, device=self.device)
        self.k_B = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.active_B = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.broken_B = torch.zeros_like(self.active_B)
        self.made_B = torch.zeros_like(self.k_B)
        self.best_B = torch.full((slots,), torch.inf, device=self.device)  # residual of this step
        self.stalled_B = torch.zeros_like(self.k_B)  # evaluations since it fell markedly
        self.forwards_B = torch.zeros_like(self.k_B)
        self.residual_BS = torch.zeros((slots, len(self.t_S)), device=self.device)
        self.condition: Condition = {}

    # --- a subclass's

    def start(self, where: torch.Tensor, z_0_BCHW: torch.Tensor) -> None:
        """Rows with these latents come into some slots, at the first equation."""
        raise NotImplementedError

    def equation(self) -> Step:
        """Each row's equation, whose other side is `prev_BCHW`."""
        raise NotImplementedError

    def advance(self, moved_B: torch.Tensor, point: Evaluation, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Some rows are done with their equation, with the result z: go on to the next one (`enter`). Returns the rows
        that have none left."""
        raise NotImplementedError

    def outputs(self, slot: int) -> Row:
        """`noise`, and what else a row leaves with, on the CPU."""
        raise NotImplementedError

    def failure(self, slot: int) -> str | None:
        """Why a row that has come to its end is no result."""
        if not bool(self.broken_B[slot]):
            return None
        return f"inversion diverged at time {self.t_S[int(self.k_B[slot])].item():g}: {self.rule.advice}"

    # --- what every walk does

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        where = sent(slots, self.device)
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
        for name in rows[0]["condition"]:
            value = torch.stack([row["condition"][name] for row in rows]).to(self.device)
            if name not in self.condition:
                # An empty slot holds a copy of a real condition: what the network makes of it is thrown away.
                self.condition[name] = value[:1].repeat(self.slots, *([1] * (value.dim() - 1)))
            self.condition[name][where] = value
        for count in (self.k_B, self.forwards_B, self.residual_BS, self.broken_B):
            count[where] = 0
        self.active_B[where] = True
        self.start(where, torch.stack([row["z"] for row in rows]).to(self.device, torch.float32))
        enter_B = slot_mask(self.slots, slots, self.device)
        self.state = choose(enter_B, self.rule.blank(self.prev_BCHW), self.state)
        self.enter(enter_B)

    def enter(self, enter_B: torch.Tensor) -> None:
        """Some rows begin the equation that they stand at."""
        self.now = self.equation()
        start_BCHW, state = self.rule.begin(self.prev_BCHW, self.now, self.state)
        self.x_BCHW = torch.where(per_row(enter_B, start_BCHW), start_BCHW, self.x_BCHW)
        self.state = choose(enter_B, state, self.state)
        self.made_B.masked_fill_(enter_B, 0)
        self.best_B.masked_fill_(enter_B, torch.inf)

    @torch.no_grad()
    def _predict_held(self, t_B: torch.Tensor) -> torch.Tensor:
        """m at x for slots that hold a row; zero in the others."""
        which = held(self.rows, self.device)
        if which is None:
            return self.predict(self.x_BCHW, t_B, self.condition)
        condition = {name: value[which] for name, value in self.condition.items()}
        m_bCHW = self.predict(self.x_BCHW[which], t_B[which], condition)
        return torch.zeros_like(self.x_BCHW).index_copy(0, which, m_bCHW)

    def step(self) -> torch.Tensor:
        self.advance_all()
        return ~self.active_B

    @torch.no_grad()
    def advance_all(self) -> None:
        """One evaluation of the network, and what each row makes of it."""
        step = self.now
        m_BCHW = self._predict_held(self.rule.time(step, self.made_B, self.state))
        for count_B in (self.made_B, self.forwards_B):
            count_B += self.active_B
        r_BCHW = step.down(self.x_BCHW, m_BCHW) - self.prev_BCHW
        residual_B = r_BCHW.flatten(1).norm(dim=1) / self.prev_BCHW.flatten(1).norm(dim=1).clamp(min=1e-12)
        point = Evaluation(
            self.rule, self.x_BCHW, m_BCHW, self.prev_BCHW, step, r_BCHW, residual_B, self.made_B,
            self._stagnant(residual_B),
        )  # fmt: skip
        x_BCHW, self.state = self.rule.update(point, self.state)
        # The largest number is no number where one is none.
        finite_B = torch.linalg.vector_norm(x_BCHW.flatten(1), torch.inf, dim=1) < torch.inf
        self.broken_B |= self.active_B & ~(finite_B & (residual_B == residual_B))
        going_B = self.active_B & ~self.broken_B
        moved_B = going_B & point.done_B
        self.x_BCHW = torch.where(per_row(going_B, x_BCHW), x_BCHW, self.x_BCHW)
        at = self.all_B, self.k_B
        self.residual_BS[at] = torch.where(moved_B, self.rule.residual(point, self.state), self.residual_BS[at])
        finished_B = self.advance(moved_B, point, x_BCHW) | self.broken_B
        self.active_B = self.active_B & ~finished_B

    def _stagnant(self, residual_B: torch.Tensor) -> torch.Tensor:
        """See `Evaluation`; counts this evaluation."""
        fell_B = residual_B < 0.7 * self.best_B
        self.stalled_B = (self.stalled_B + self.active_B).masked_fill_(fell_B, 0)
        self.best_B = torch.minimum(self.best_B, residual_B)
        return (self.stalled_B >= 2) & (self.best_B <= self.noise)

    def unload(self, slots: Sequence[int]) -> list[Row]:
        rows = []
        for slot in slots:
            row = self.rows[slot]
            assert row is not None
            self.rows[slot] = None
            outputs = {**self.outputs(slot), "forwards": int(self.forwards_B[slot])}
            if self.rule.checks:
                outputs["residual"] = self.residual_BS[slot].to("cpu", copy=True)
            why = self.failure(slot)
            rows.append({**(row if why is None else failed(row, why)), **outputs})
        where = sent(slots, self.device)
        self.broken_B[where] = False
        self.active_B[where] = False
        return rows


class InversionProblem(Walk[State]):
    """The walk from z_0 to z_T up a schedule whose steps are undone one by one: an equation a step, whose result is the
    next one's other side.

    Args:
        schedule: The sampler's coefficients.
        keep_path: Rows also leave with `path` (S + 1, C, H, W): every z_t, z_0 first; needed to replay.
        keep_shown: Rows also leave with `input_bias` (S, C, H, W): what was added to each z_t where the network was
            evaluated last, the picture's step first.
        recorded: Steps of full slots go as one CUDA graph (`stages.inversion.recorded`).
        options: Of `Walk`.

    Attributes:
        changing: Names of what a step changes: tensors, or trees of them. What `now` is follows from them.
    """

    changing: Sequence[str] = (
        "x_BCHW", "prev_BCHW", "state", "k_B", "active_B", "broken_B", "made_B", "best_B", "stalled_B", "forwards_B",
        "residual_BS", "path_BSCHW", "shown_BSCHW",
    )  # fmt: skip

    def __init__(
        self, predict: Predict, schedule: Schedule, rule: Rule[State], *, keep_path: bool = False,
        keep_shown: bool = False, recorded: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.schedule, self.keep_path = schedule.to(options.get("device", "cpu")), keep_path
        self.keep_shown, self.recorded = keep_shown, recorded
        super().__init__(predict, self.schedule.t_S, rule, **options)

    def resize(self, slots: int) -> None:
        super().resize(slots)
        self.made, self.due = 0, [0] * slots  # steps of all, and the first that can make each row done
        self.recording: RecordedStep | None = None
        self.path_BSCHW = (
            torch.zeros((slots, len(self.schedule) + 1, *self.latent_shape), device=self.device)
            if self.keep_path
            else None
        )
        self.shown_BSCHW = (
            torch.zeros((slots, len(self.schedule), *self.latent_shape), device=self.device)
            if self.keep_shown
            else None
        )

    def start(self, where: torch.Tensor, z_0_BCHW: torch.Tensor) -> None:
        self.prev_BCHW[where] = z_0_BCHW
        if self.path_BSCHW is not None:
            self.path_BSCHW[where, 0] = z_0_BCHW

    def equation(self) -> Step:
        return self.schedule.at(self.k_B)

    def advance(self, moved_B: torch.Tensor, point: Evaluation, z_BCHW: torch.Tensor) -> torch.Tensor:
        self.prev_BCHW = torch.where(per_row(moved_B, z_BCHW), z_BCHW, self.prev_BCHW)
        if self.path_BSCHW is not None:
            kept = self.path_BSCHW[self.all_B, self.k_B + 1]
            self.path_BSCHW[self.all_B, self.k_B + 1] = torch.where(per_row(moved_B, kept), z_BCHW, kept)
        if self.shown_BSCHW is not None:
            kept = self.shown_BSCHW[self.all_B, self.k_B]
            self.shown_BSCHW[self.all_B, self.k_B] = torch.where(per_row(moved_B, kept), point.x_BCHW - z_BCHW, kept)
        last_B = self.k_B == len(self.schedule) - 1
        enter_B = moved_B & ~last_B
        self.k_B += enter_B
        self.enter(enter_B)
        return moved_B & last_B

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        super().load(slots, rows)
        for slot in slots:
            self.due[slot] = self.made + self._least(0)

    def step(self) -> torch.Tensor:
        self.made += 1
        if self.recorded and None not in self.rows:
            if self.recording is None:  # here, where the solver halves what does not fit
                self.recording = RecordedStep(self)
            self.recording(self)
            return ~self.active_B
        if self.recording is not None:
            self.now = self.equation()
        return super().step()

    def quiet(self) -> int:
        """See `stages.engine.solver.Problem`. The device is asked where its rows stand only once one may be done."""
        loaded = [slot for slot, row in enumerate(self.rows) if row is not None]
        if any(self.due[slot] <= self.made for slot in loaded):
            self.due = [self.made + self._least(k) for k in self.k_B.tolist()]
        return min(self.due[slot] for slot in loaded) - self.made

    def _least(self, k: int) -> int:
        """The fewest evaluations that a row at equation k is from its end."""
        return (len(self.schedule) - k - 1) * self.rule.fewest + (self.rule.fewest if k == 0 else 1)

    def outputs(self, slot: int) -> Row:
        outputs: Row = {"noise": (self.prev_BCHW[slot] * self.schedule.seed_scale).to("cpu", copy=True)}
        if self.path_BSCHW is not None:
            outputs["path"] = self.path_BSCHW[slot].to("cpu", copy=True)
        if self.shown_BSCHW is not None:
            outputs["input_bias"] = self.shown_BSCHW[slot].to("cpu", copy=True)
        return outputs
