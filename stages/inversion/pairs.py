"""Algebraically exact inversion with extra state: two latents are stored instead of one. A class of its own in every
table.

All rows stand at the same step: nothing iterates, so no row ever waits for another.

Both follow an equation dx / ds = f(x, s). For a variance-preserving diffusion x = z / alpha, s = sigma / alpha, and f
is the noise. A rectified flow is one as it stands (ours): x = z, s = sigma, f its velocity, and nothing is divided by
alpha, which is 0 where every flow begins.

Legend: B rows; `z_BCHW` latents; a pair is two of them; `k` counts steps from the picture up.
"""

from __future__ import annotations

import torch

from stages.models.latent import Condition, Predict
from stages.models.schedule import Schedule

Pair = tuple[torch.Tensor, torch.Tensor]


def _slope(predict: Predict, schedule: Schedule, k: int, z_BCHW: torch.Tensor, condition: Condition) -> torch.Tensor:
    """f at step k."""
    m_BCHW = predict(z_BCHW, schedule.t_S[k].expand(len(z_BCHW)), condition)
    return m_BCHW if _flow(schedule) else schedule.epsilon(k, z_BCHW, m_BCHW)


def _flow(schedule: Schedule) -> bool:
    return schedule.prediction == "flow"


def _require_alpha(schedule: Schedule, method: str) -> None:
    if not _flow(schedule) and float(schedule.alpha_S[-1]) <= 0:
        raise ValueError(f"{method} divides by the signal at the last time, which is zero in this model's schedule")


@torch.no_grad()
def belm_invert(predict: Predict, schedule: Schedule, z_BCHW: torch.Tensor, condition: Condition) -> Pair:
    """O-BELM (Wang et al., 2024): the two-step explicit scheme solved for its oldest term.

    With h_i = s_i - s_(i-1), sampling is
    x_(i-1) = (h_i / h_(i+1))^2 x_(i+1) + (1 - (h_i / h_(i+1))^2) x_i - h_i (h_i + h_(i+1)) / h_(i+1) f_i,
    which is linear in x_(i+1). The first step up is DDIM inversion.

    Returns:
        (z_T, z_(T-1)): both are needed to come back.
    """
    _require_alpha(schedule, "belm")
    alpha, sigma = _levels(schedule)
    older = z_BCHW / alpha[0]
    step = schedule.at(torch.zeros(len(z_BCHW), dtype=torch.int64, device=z_BCHW.device))
    newer = step.explicit(z_BCHW, predict(z_BCHW, step.t_B, condition)) / alpha[1]
    for i in range(1, len(schedule)):
        ratio, span = _belm_numbers(alpha, sigma, i)
        eps = _slope(predict, schedule, i - 1, newer * alpha[i], condition)
        older, newer = newer, (older - (1 - ratio) * newer + span * eps) / ratio
    return newer * alpha[-1], older * alpha[-2]


@torch.no_grad()
def belm_generate(predict: Predict, schedule: Schedule, pair: Pair, condition: Condition) -> torch.Tensor:
    """The way back down from (z_T, z_(T-1))."""
    alpha, sigma = _levels(schedule)
    older, newer = pair[0] / alpha[-1], pair[1] / alpha[-2]
    for i in range(len(schedule) - 1, 0, -1):
        ratio, span = _belm_numbers(alpha, sigma, i)
        eps = _slope(predict, schedule, i - 1, newer * alpha[i], condition)
        older, newer = newer, ratio * older + (1 - ratio) * newer - span * eps
    return newer * alpha[0]


def _levels(schedule: Schedule) -> tuple[list[float], list[float]]:
    """What z is divided by to give x, and x's s times that, at the S + 1 points of the path, the picture's first."""
    alpha = [float(schedule.alpha_prev_S[0]), *schedule.alpha_S.tolist()]
    sigma = [float(schedule.sigma_prev_S[0]), *schedule.sigma_S.tolist()]
    return [1.0] * len(alpha) if _flow(schedule) else alpha, sigma


def _belm_numbers(alpha: list[float], sigma: list[float], i: int) -> tuple[float, float]:
    s = [n / a for n, a in zip(sigma[i - 1 : i + 2], alpha[i - 1 : i + 2], strict=True)]
    h, h_next = s[1] - s[0], s[2] - s[1]
    return (h / h_next) ** 2, h * (h + h_next) / h_next


@torch.no_grad()
def edict_invert(
    predict: Predict, schedule: Schedule, z_BCHW: torch.Tensor, condition: Condition, mixing: float = 0.93
) -> Pair:
    """EDICT (Wallace et al., 2023): two coupled latents x, y, each stepped with the noise at the other one, then mixed.

    As in the authors' code, x is stepped first at the first sampling step, y at the second, and so on in turn.
    Inversion undoes the sampling equations one by one. Both start at z_0; p = 0.93 is the paper's mixing weight.

    Returns:
        (x_T, y_T).
    """
    _require_alpha(schedule, "edict")
    pair = [z_BCHW, z_BCHW]
    for k in range(len(schedule)):
        phi, psi = _edict_numbers(schedule, k)
        pair[1] = (pair[1] - (1 - mixing) * pair[0]) / mixing
        pair[0] = (pair[0] - (1 - mixing) * pair[1]) / mixing
        first, second = _edict_order(schedule, k)
        pair[second] = (pair[second] - psi * _slope(predict, schedule, k, pair[first], condition)) / phi
        pair[first] = (pair[first] - psi * _slope(predict, schedule, k, pair[second], condition)) / phi
    return pair[0], pair[1]


@torch.no_grad()
def edict_generate(
    predict: Predict, schedule: Schedule, pair: Pair, condition: Condition, mixing: float = 0.93
) -> torch.Tensor:
    """The way back down from (x_T, y_T); the result is x_0."""
    z = list(pair)
    for k in range(len(schedule) - 1, -1, -1):
        phi, psi = _edict_numbers(schedule, k)
        first, second = _edict_order(schedule, k)
        z[first] = phi * z[first] + psi * _slope(predict, schedule, k, z[second], condition)
        z[second] = phi * z[second] + psi * _slope(predict, schedule, k, z[first], condition)
        z[0] = mixing * z[0] + (1 - mixing) * z[1]
        z[1] = mixing * z[1] + (1 - mixing) * z[0]
    return z[0]


def _edict_order(schedule: Schedule, k: int) -> tuple[int, int]:
    """Which of the pair is stepped first and second at sampling step S - 1 - k."""
    first = (len(schedule) - 1 - k) % 2
    return first, 1 - first


def _edict_numbers(schedule: Schedule, k: int) -> tuple[float, float]:
    """phi and psi of z_prev = phi z + psi f, in terms of noise whatever the network of a diffusion predicts."""
    if _flow(schedule):
        return float(schedule.scale_S[k]), float(schedule.weight_S[k])
    phi = float(schedule.alpha_prev_S[k] / schedule.alpha_S[k])
    return phi, float(schedule.sigma_prev_S[k]) - phi * float(schedule.sigma_S[k])
