"""One batched solver for every method: a variable a row, a loss a row, a stopping rule a row.

The solver holds `slots` rows, advances all of them at once, lets each row stop by itself and gives the freed slot to
the next waiting row (continuous batching, ours). Shapes never change while it runs: an empty slot is masked.

Legend: B slots; `x_B...` has one leading entry a slot; `active_B`, `done_B`, `which_B` are boolean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from pipeline.contract import Row

RUNNING, REACHED, STALLED, LIMIT, DIVERGED = range(5)
REASONS = ("running", "reached", "stalled", "limit", "diverged")
"""Why a row stopped, by code: at its target, without progress, at its step limit, or with a non-finite value."""


class Problem(Protocol):
    """A frozen network and one variable a slot, in tensors that are allocated once.

    A row may pass through several sub-problems (timesteps) inside `step` without leaving its slot; it is done when the
    last one is. A problem may also offer `resize(slots)`: forget all rows and reallocate for fewer slots; `solve` then
    survives running out of device memory.
    """

    slots: int

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Write rows into free slots, and reset all state of those slots."""

    def step(self) -> torch.Tensor:
        """Advance every loaded slot once. Returns done_B; a done row must no longer change until it is unloaded.

        What done_B says of empty slots is not looked at.
        """

    def unload(self, slots: Sequence[int]) -> list[Row]:
        """The finished rows of these slots, with their outputs; the slots are free afterwards."""


@dataclass
class Occupancy:
    """How full the solver was: filled in by `solve`, added up over calls."""

    steps: int = 0
    slot_steps: int = 0
    busy_slot_steps: int = 0
    rows: int = 0
    restarts: int = 0

    @property
    def share(self) -> float:
        """The share of slot steps that worked on a row (0 when nothing ran)."""
        return self.busy_slot_steps / self.slot_steps if self.slot_steps else 0.0


def solve(problem: Problem, rows: Iterable[Row], *, occupancy: Occupancy | None = None, poll: int = 1) -> Iterator[Row]:
    """Solve every row's problem by continuous batching; rows come out as they finish.

    Rows that arrive with status "failed" pass through untouched and take no slot. When the device runs out of memory
    and the problem can `resize`, the rows in flight start again with half the slots; their random numbers are their
    own, so the result is the same.

    Args:
        problem: Holds the slots.
        rows: Read lazily, one for each freed slot.
        occupancy: Counts of slot steps, added to in place.
        poll: Steps between two looks at done_B. A look waits for the device; finished rows idle until the next one.

    Raises:
        torch.OutOfMemoryError: One slot alone does not fit, or the problem cannot `resize`.
    """
    occupancy = occupancy if occupancy is not None else Occupancy()
    source = iter(rows)
    waiting: deque[Row] = deque()
    held: dict[int, Row] = {}
    while True:
        free = [slot for slot in range(problem.slots) if slot not in held]
        while len(waiting) < len(free):
            taken = list(islice(source, len(free) - len(waiting)))
            if not taken:
                break
            for row in taken:
                if row.get("status") == "failed":
                    yield row
                else:
                    waiting.append(row)
        try:
            if free and waiting:
                batch = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                slots = free[: len(batch)]
                held.update(zip(slots, batch, strict=True))
                problem.load(slots, batch)
            if not held:
                return
            for _ in range(poll):
                done_B = problem.step()
                occupancy.steps += 1
                occupancy.slot_steps += problem.slots
                occupancy.busy_slot_steps += len(held)
        except torch.OutOfMemoryError:
            resize = getattr(problem, "resize", None)
            if resize is None or problem.slots == 1:
                raise
            waiting.extendleft(reversed(list(held.values())))
            held.clear()
            resize(problem.slots // 2)
            occupancy.restarts += 1
            continue
        finished = [slot for slot in done_B.nonzero().flatten().tolist() if slot in held]
        if finished:
            occupancy.rows += len(finished)
            for slot in finished:
                del held[slot]
            yield from problem.unload(finished)


def slot_mask(
    slots: int, which: Sequence[int] | torch.Tensor, device: torch.device | str | None = None
) -> torch.Tensor:
    """which_B from slot numbers; a boolean mask passes through."""
    if isinstance(which, torch.Tensor) and which.dtype == torch.bool:
        return which
    which_B = torch.zeros(slots, dtype=torch.bool, device=device)
    which_B[torch.as_tensor(which, dtype=torch.long, device=device)] = True
    return which_B


def per_row(value_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """value_B viewed as (B, 1, ..., 1), to broadcast over the variable `like` (B, ...)."""
    return value_B.view(-1, *([1] * (like.dim() - 1)))


class RowAdamW:
    """AdamW (Loshchilov and Hutter, 2019, Algorithm 2) on one variable of shape (B, ...), every row on its own clock.

    The arithmetic follows `torch.optim.AdamW`; step count and both moments belong to the row, so a slot that is given
    to the next row starts afresh while its neighbours go on. The variable is updated in place and keeps its address.

    Args:
        variable: (B, ...), float32; changed in place.
        lr: Learning rate, or a function of steps_B (int64, the steps a row has made, 0 at its first) that gives lr_B.
        betas, eps, weight_decay: As in AdamW.
    """

    def __init__(
        self,
        variable: torch.Tensor,
        lr: float | Callable[[torch.Tensor], torch.Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.variable = variable
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.first = torch.zeros_like(variable, requires_grad=False)
        self.second = torch.zeros_like(variable, requires_grad=False)
        self.steps_B = torch.zeros(variable.shape[0], dtype=torch.int64, device=variable.device)

    def reset(self, which: Sequence[int] | torch.Tensor) -> None:
        """Forget moments and step count of some slots (numbers, or a mask which_B)."""
        which_B = slot_mask(len(self.steps_B), which, self.steps_B.device)
        self.first.masked_fill_(per_row(which_B, self.first), 0.0)
        self.second.masked_fill_(per_row(which_B, self.second), 0.0)
        self.steps_B.masked_fill_(which_B, 0)

    @torch.no_grad()
    def step(self, grad: torch.Tensor, active_B: torch.Tensor | None = None, lr_B: torch.Tensor | None = None) -> None:
        """One update of the active rows; the others keep variable, moments and count.

        Args:
            grad: Gradient of each row's own loss, shape of the variable (a sum over rows, not a mean, is to be
                differentiated: Adam hides the scale, but `eps` does not).
            active_B: Rows to update; all when None.
            lr_B: Learning rate a row, instead of the one given at construction.
        """
        beta1, beta2 = self.betas
        if lr_B is None:
            rate = self.lr
            lr_B = rate(self.steps_B) if callable(rate) else torch.full_like(self.steps_B, rate, dtype=torch.float64)
        lr_B = lr_B.double()
        # Bias corrections in float64: 1 - 0.999^1 loses four digits in float32.
        steps_B = (self.steps_B + 1).double()
        rate_B = lr_B / (1 - beta1**steps_B)
        root_B = (1 - beta2**steps_B).sqrt()

        def row(value_B: torch.Tensor) -> torch.Tensor:
            return per_row(value_B.to(self.variable.dtype), self.variable)

        first = torch.lerp(self.first, grad, 1 - beta1)
        second = self.second * beta2 + grad * grad * (1 - beta2)
        moved = self.variable * row(1 - lr_B * self.weight_decay) - row(rate_B) * first / (
            second.sqrt() / row(root_B) + self.eps
        )
        if active_B is None:
            self.first.copy_(first)
            self.second.copy_(second)
            self.variable.copy_(moved)
            self.steps_B.add_(1)
            return
        keep = per_row(active_B, self.variable)
        self.first.copy_(torch.where(keep, first, self.first))
        self.second.copy_(torch.where(keep, second, self.second))
        self.variable.copy_(torch.where(keep, moved, self.variable))
        self.steps_B.add_(active_B.to(torch.int64))


@dataclass(frozen=True)
class StoppingRule:
    """When a row stops: the first of these that holds (ours).

    Attributes:
        limit: Most steps a row makes.
        absolute: Stop when the value is at or below it.
        relative: The smallest gain, as a share of |best value|, that counts as progress. Used with `patience`.
        patience: Stop after so many steps in a row without progress; never when None.
        minimum: Steps before `absolute` or `patience` may stop a row.
    """

    limit: int
    absolute: float | None = None
    relative: float = 0.0
    patience: int | None = None
    minimum: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}: a row needs at least one step")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}: give at least 1, or null for never")

    def start(self, slots: int, device: torch.device | str = "cpu") -> Stopper:
        return Stopper(self, slots, device)


class Stopper:
    """The state of a `StoppingRule` for every slot.

    Attributes:
        steps_B: Values seen since the row's reset.
        best_B: Smallest value seen.
        improved_B: Rows whose last value was their best one (for problems that keep the best iterate).
        reason_B: Code of `REASONS`.
    """

    def __init__(self, rule: StoppingRule, slots: int, device: torch.device | str = "cpu") -> None:
        self.rule = rule
        self.steps_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.best_B = torch.full((slots,), torch.inf, device=device)
        self.mark_B = torch.full((slots,), torch.inf, device=device)  # what the next progress is measured from
        self.stalled_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.improved_B = torch.zeros(slots, dtype=torch.bool, device=device)
        self.reason_B = torch.full((slots,), RUNNING, dtype=torch.int64, device=device)

    def reset(self, which: Sequence[int] | torch.Tensor) -> None:
        """Start some slots (numbers, or a mask which_B) afresh."""
        which_B = slot_mask(len(self.steps_B), which, self.steps_B.device)
        for state_B, value in (
            (self.steps_B, 0), (self.best_B, torch.inf), (self.mark_B, torch.inf), (self.stalled_B, 0),
            (self.improved_B, False), (self.reason_B, RUNNING),
        ):  # fmt: skip
            state_B.masked_fill_(which_B, value)

    @torch.no_grad()
    def update(self, value_B: torch.Tensor, active_B: torch.Tensor) -> torch.Tensor:
        """Count one step of the active rows with the value it ended at; returns done_B (active rows only)."""
        rule = self.rule
        value_B = value_B.detach().to(self.best_B.dtype)
        self.steps_B.add_(active_B.to(torch.int64))
        finite_B = value_B.isfinite()
        self.improved_B.copy_(active_B & finite_B & (value_B < self.best_B))
        self.best_B.copy_(torch.where(self.improved_B, value_B, self.best_B))
        progress_B = finite_B & (self.mark_B.isinf() | (value_B < self.mark_B - rule.relative * self.mark_B.abs()))
        self.mark_B.copy_(torch.where(active_B & progress_B, value_B, self.mark_B))
        stalled_B = torch.where(progress_B, 0, self.stalled_B + 1)
        self.stalled_B.copy_(torch.where(active_B, stalled_B, self.stalled_B))
        reason_B = torch.where(self.steps_B >= rule.limit, LIMIT, RUNNING)
        ripe_B = self.steps_B >= rule.minimum
        if rule.patience is not None:
            reason_B = torch.where(ripe_B & (self.stalled_B >= rule.patience), STALLED, reason_B)
        if rule.absolute is not None:
            reason_B = torch.where(ripe_B & (value_B <= rule.absolute), REACHED, reason_B)
        reason_B = torch.where(finite_B, reason_B, DIVERGED)
        self.reason_B.copy_(torch.where(active_B, reason_B, self.reason_B))
        return active_B & (self.reason_B != RUNNING)


def capture(step: Callable[[], None], warmup: int = 3) -> Callable[[], None]:
    """Record `step` as a CUDA graph and return its replay (static tensors in and out; no host synchronisation inside).

    The warm-up runs and the recording change the tensors that `step` changes: capture before rows are loaded.

    Raises:
        RuntimeError: No CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device: set `accelerate: none` or `compile` in the job")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
