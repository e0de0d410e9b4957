"""RF-Inversion: a rectified flow steered to given noise on the way up, and to the picture on the way down. Coming back
needs the picture's latent beside the seed: a class of its own in every table.

"Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations" (Rout et al., ICLR 2025),
equations 8 and 15, deterministic form. Nothing iterates, so all rows stand at the same step.

Legend: B rows; `z_BCHW` latents; `y_BCHW` the fixed noise; `v_BCHW` the velocity dz / dsigma; S steps, index 0 next to
the picture.
"""

from __future__ import annotations

import torch

from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule


@torch.no_grad()
def steered_up(
    predict: Predict, schedule: Schedule, z_BCHW: torch.Tensor, condition: Condition, y_BCHW: torch.Tensor,
    gamma: float,
) -> torch.Tensor:  # fmt: skip
    """z_T: Euler steps of v + gamma ((y - z) / (1 - sigma) - v), each at the cleaner end of its step.

    Args:
        y_BCHW: Where the straight line of the second velocity leads.
        gamma: Its weight; at 1 the result is y itself.
    """
    assert schedule.t_prev_S is not None, "a rectified flow"
    for k in range(len(schedule)):
        sigma = float(schedule.sigma_prev_S[k])
        v_BCHW = predict(z_BCHW, schedule.t_prev_S[k].expand(len(z_BCHW)), condition)
        v_BCHW = v_BCHW + gamma * ((y_BCHW - z_BCHW) / (1 - sigma) - v_BCHW)
        z_BCHW = z_BCHW + (float(schedule.sigma_S[k]) - sigma) * v_BCHW
    return z_BCHW


@torch.no_grad()
def steered_down(
    predict: Predict, schedule: Schedule, z_BCHW: torch.Tensor, condition: Condition, z_0_BCHW: torch.Tensor,
    eta: float, steered: int,
) -> torch.Tensor:  # fmt: skip
    """z of the picture that comes back: Euler steps of v + eta ((z - z_0) / sigma - v), without eta after a while.

    Args:
        z_0_BCHW: The picture's latent.
        eta: Weight of the straight line to it; at 1 that is where a steered step leads.
        steered: Sampling steps under eta, the first ones.
    """
    for k in range(len(schedule) - 1, -1, -1):
        sigma = float(schedule.sigma_S[k])
        v_BCHW = predict(z_BCHW, schedule.t_S[k].expand(len(z_BCHW)), condition)
        if len(schedule) - k <= steered:
            v_BCHW = v_BCHW + eta * ((z_BCHW - z_0_BCHW) / sigma - v_BCHW)
        z_BCHW = z_BCHW + (float(schedule.sigma_prev_S[k]) - sigma) * v_BCHW
    return z_BCHW
