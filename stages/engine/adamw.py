"""AdamW for a variable whose rows come and go.

Legend: B slots; `which_B`, `active_B` are boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stages.engine.slots import per_row, slot_mask


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
