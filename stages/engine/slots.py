"""Addressing slots: masks from slot numbers, and one number a row spread over a variable.

Legend: B slots; `which_B` is boolean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stages.engine.device import sent


def slot_mask(
    slots: int, which: Sequence[int] | torch.Tensor, device: torch.device | str | None = None
) -> torch.Tensor:
    """which_B from slot numbers; a boolean mask passes through."""
    if isinstance(which, torch.Tensor) and which.dtype == torch.bool:
        return which
    which_B = torch.zeros(slots, dtype=torch.bool, device=device)
    which_B[sent(which, device, torch.long)] = True
    return which_B


def held(rows: Sequence[object | None], device: torch.device | str | None = None) -> torch.Tensor | None:
    """Numbers of the slots that hold a row, (b,) ascending; None: all do. A network that is shown these alone costs
    nothing for empty slots, and whoever holds the rows knows them without asking the device.
    """
    filled = [slot for slot, row in enumerate(rows) if row is not None]
    return None if len(filled) == len(rows) else sent(filled, device, torch.long)


def per_row(value_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """value_B viewed as (B, 1, ..., 1), to broadcast over the variable `like` (B, ...)."""
    return value_B.view(-1, *([1] * (like.dim() - 1)))
