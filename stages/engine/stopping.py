"""When a row stops: by its own values, whatever its neighbours do.

Legend: B slots; `which_B`, `active_B`, `done_B` are boolean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.engine.slots import slot_mask

RUNNING, REACHED, STALLED, LIMIT, DIVERGED = range(5)
REASONS = ("running", "reached", "stalled", "limit", "diverged")
"""Why a row stopped, by code: at its target, without progress, at its step limit, or with a non-finite value."""


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
