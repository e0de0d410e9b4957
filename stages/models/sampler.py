"""Sampling: from the noise z_T down to z_0 by a schedule's deterministic steps, all rows in step.

Legend: B rows; S steps, index 0 next to the picture; `z_BCHW` latents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule


def denoise(
    predict: Predict,
    schedule: Schedule,
    z_BCHW: torch.Tensor,
    condition: Condition | Callable[[int], Condition],
    bias_BSCHW: torch.Tensor | None = None,
    *,
    recompute: bool = False,
) -> Iterator[torch.Tensor]:
    """The latents after each step, z_0 last: DDIM (Song et al., 2021, equation 12, eta = 0) or Euler steps of a flow.

    Differentiable in the noise, the condition and the bias.

    Args:
        z_BCHW: The noise z_T, as the sampler's pipeline would be given it.
        condition: The same in every step, or made for step k.
        bias_BSCHW: What is added to each step's result (replay of latent bias optimisation).
        recompute: Under gradients, compute each step again on the way back, so that memory holds one pass of the
            network instead of S.
    """

    def down(z_BCHW: torch.Tensor, k: int) -> torch.Tensor:
        step = schedule.at(torch.full((len(z_BCHW),), k, device=z_BCHW.device))
        told = condition(k) if callable(condition) else condition
        return step.down(z_BCHW, predict(z_BCHW, step.t_B, told))

    z_BCHW = z_BCHW / schedule.seed_scale
    for k in range(len(schedule) - 1, -1, -1):
        z_BCHW = checkpoint(down, z_BCHW, k, use_reentrant=False) if recompute else down(z_BCHW, k)
        if bias_BSCHW is not None:
            z_BCHW = z_BCHW + bias_BSCHW[:, k]
        yield z_BCHW


@torch.no_grad()
def sample(
    predict: Predict,
    schedule: Schedule,
    z_BCHW: torch.Tensor,
    condition: Condition | Callable[[int], Condition],
    bias_BSCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """z_0 of the noise z_T; see `denoise`."""
    (z_0_BCHW,) = deque(denoise(predict, schedule, z_BCHW, condition, bias_BSCHW), maxlen=1)
    return z_0_BCHW
