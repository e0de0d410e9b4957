"""Gradients of the rows' losses, scaled a row where half precision would lose them.

Legend: B slots; `loss_B`, `scale_B` one number a slot; `active_B`, `which_B`, `skip_B` are boolean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from stages.engine.slots import per_row, slot_mask

FLOAT16_SCALE = 2.0**16
"""What `torch.amp.GradScaler` starts from too."""


def loss_scale(dtypes: Iterable[torch.dtype]) -> float | None:
    """`RowGradient`'s scale for a gradient through networks of these dtypes: None unless one is float16."""
    return FLOAT16_SCALE if torch.float16 in set(dtypes) else None


class RowGradient:
    """The gradient of the *sum* of the rows' own losses: a row's part does not depend on the other rows.

    Gradients of float16 activations underflow; multiplying the loss before, and dividing the gradient after, keeps them
    (Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.2). There, as in `torch.amp.GradScaler`, one
    scale serves all: one overflow costs everyone the step. Here each row has its own (ours): a row whose gradient
    overflows skips the update and halves its scale; its neighbours go on. A scale never grows again: rows are short.

    The tensors keep their addresses and nothing waits for the device, so a step may be captured.

    Args:
        slots: B.
        scale: Of a fresh row, `FLOAT16_SCALE` under float16; None where no scale is needed (float32, bfloat16): the
            gradient is then left as it is, and no row skips.

    Attributes:
        scale_B: Each row's scale; ones without one.
    """

    def __init__(self, slots: int, scale: float | None = None, device: torch.device | str = "cpu") -> None:
        self.scale = scale
        self.scale_B = torch.full((slots,), scale or 1.0, device=device)
        self._none_B = torch.zeros(slots, dtype=torch.bool, device=device)

    def reset(self, which: Sequence[int] | torch.Tensor) -> None:
        """Give some slots (numbers, or a mask which_B) a fresh row's scale."""
        self.scale_B.masked_fill_(slot_mask(len(self.scale_B), which, self.scale_B.device), self.scale or 1.0)

    def __call__(
        self, loss_B: torch.Tensor, x_B: torch.Tensor, active_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient and which rows must skip the update.

        Args:
            loss_B: Each row's loss.
            x_B: The variable (B, ...), a leaf of loss_B's graph, float32.
            active_B: Rows whose scales may be halved; all when None.

        Returns:
            grad_B, of x_B's shape, zero in rows that overflowed; skip_B.
        """
        if self.scale is None:
            (grad_B,) = torch.autograd.grad(loss_B.sum(), x_B)
            return grad_B, self._none_B
        grad_B, skip_B = scaled_gradient(loss_B, x_B, self.scale_B)
        halved_B = skip_B if active_B is None else skip_B & active_B
        self.scale_B.copy_(torch.where(halved_B, self.scale_B / 2, self.scale_B))
        return grad_B, skip_B


def scaled_gradient(
    loss_B: torch.Tensor, x_B: torch.Tensor, scale_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of each row's loss, which is multiplied by the row's scale on its way back through the network.

    Args:
        loss_B: Each row's loss.
        x_B: The variable (B, ...), a leaf of loss_B's graph, float32.
        scale_B: Positive.

    Returns:
        grad_B, of x_B's shape and unscaled, zero in rows that overflowed; which rows did.
    """
    (grad_B,) = torch.autograd.grad((loss_B * scale_B).sum(), x_B)
    with torch.no_grad():
        grad_B = grad_B / per_row(scale_B, grad_B)
        over_B = ~grad_B.flatten(1).isfinite().all(1)
        return torch.where(per_row(over_B, grad_B), 0.0, grad_B), over_B
