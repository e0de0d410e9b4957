"""Sampling: from the noise z_T down to z_0 by a schedule's deterministic steps, all rows in step.

Legend: B rows; S steps (evaluations of the network, where those are more), index 0 next to the picture; `z_BCHW`
latents, `m_BCHW` what the network answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from stages.models.latent import Condition, Predict
from stages.models.multistep import Multistep
from stages.models.schedule import Schedule


def denoise(
    predict: Predict,
    schedule: Schedule | Multistep,
    z_BCHW: torch.Tensor,
    condition: Condition | Callable[[int], Condition],
    bias_BSCHW: torch.Tensor | None = None,
    *,
    input_bias_BSCHW: torch.Tensor | None = None,
    recompute: bool = False,
) -> Iterator[torch.Tensor]:
    """The latents after each step, z_0 last: DDIM (Song et al., 2021, equation 12, eta = 0), Euler steps of a flow, or
    a sampler whose steps hang together; the latter's are the points that the network is shown.

    Differentiable in the noise, the condition and the bias.

    Args:
        z_BCHW: The noise z_T, as the sampler's pipeline would be given it.
        condition: The same in every step, or made for step k.
        bias_BSCHW: What is added to each step's result (replay of latent bias optimisation); of a `Schedule` alone.
        input_bias_BSCHW: What is added to what the network is shown at each step (replay without a pass of its own).
        recompute: Under gradients, compute each step again on the way back, so that memory holds one pass of the
            network instead of S.
    """

    if isinstance(schedule, Multistep):
        yield from _denoise_multistep(predict, schedule, z_BCHW, condition, recompute)
        return

    def down(z_BCHW: torch.Tensor, k: int) -> torch.Tensor:
        step = schedule.at(torch.full((len(z_BCHW),), k, device=z_BCHW.device))
        told = condition(k) if callable(condition) else condition
        shown_BCHW = z_BCHW if input_bias_BSCHW is None else z_BCHW + input_bias_BSCHW[:, k]
        return step.down(z_BCHW, predict(shown_BCHW, step.t_B, told))

    z_BCHW = z_BCHW / schedule.seed_scale
    for k in range(len(schedule) - 1, -1, -1):
        z_BCHW = checkpoint(down, z_BCHW, k, use_reentrant=False) if recompute else down(z_BCHW, k)
        if bias_BSCHW is not None:
            z_BCHW = z_BCHW + bias_BSCHW[:, k]
        yield z_BCHW


def _denoise_multistep(
    predict: Predict,
    sampler: Multistep,
    seed_BCHW: torch.Tensor,
    condition: Condition | Callable[[int], Condition],
    recompute: bool,
) -> Iterator[torch.Tensor]:
    def answer(x_BCHW: torch.Tensor, n: int) -> torch.Tensor:
        told = condition(n) if callable(condition) else condition
        return predict(x_BCHW, sampler.t_S[n].expand(len(x_BCHW)), told)

    made_BNCHW = seed_BCHW.new_zeros((len(seed_BCHW), 0, *seed_BCHW.shape[1:]))
    for n in range(len(sampler) - 1, -1, -1):
        x_BCHW = sampler.point(n, seed_BCHW, made_BNCHW)
        if n < len(sampler) - 1:
            yield x_BCHW
        m_BCHW = checkpoint(answer, x_BCHW, n, use_reentrant=False) if recompute else answer(x_BCHW, n)
        made_BNCHW = torch.cat([m_BCHW[:, None], made_BNCHW], 1)
    yield sampler.picture(seed_BCHW, made_BNCHW)


@torch.no_grad()
def sample(
    predict: Predict,
    schedule: Schedule | Multistep,
    z_BCHW: torch.Tensor,
    condition: Condition | Callable[[int], Condition],
    bias_BSCHW: torch.Tensor | None = None,
    *,
    input_bias_BSCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """z_0 of the noise z_T; see `denoise`."""
    drawn = denoise(predict, schedule, z_BCHW, condition, bias_BSCHW, input_bias_BSCHW=input_bias_BSCHW)
    (z_0_BCHW,) = deque(drawn, maxlen=1)
    return z_0_BCHW
