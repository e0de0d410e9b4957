"""Exact pairs: their formulas, and the way back."""

from __future__ import annotations

import torch

from stages.inversion import pairs as exact_pair
from tests.stages.inversion.plain import STEPS


def test_belm_is_its_formula_and_comes_back(model, work) -> None:
    z, condition, schedule = work
    pair = exact_pair.belm_invert(model.predictor(), schedule, z, condition)
    again = exact_pair.belm_generate(model.predictor(), schedule, pair, condition)
    torch.testing.assert_close(again, z, rtol=1e-2, atol=1e-2)
    # One sampling step in the paper's own variables, from the last pair.
    a = [float(schedule.alpha_prev_S[0]), *schedule.alpha_S.tolist()]
    s = [float(schedule.sigma_prev_S[0]) / a[0], *(schedule.sigma_S / schedule.alpha_S).tolist()]
    n = STEPS - 1
    h, h_next = s[n] - s[n - 1], s[n + 1] - s[n]
    with torch.no_grad():
        eps = model.predictor()(pair[1], schedule.t_S[n - 1].expand(3), condition)
    lower = a[n - 1] * (
        h**2 / h_next**2 * pair[0] / a[n + 1]
        + (1 - h**2 / h_next**2) * pair[1] / a[n]
        - h * (h + h_next) / h_next * eps
    )
    shorter = exact_pair.belm_invert(model.predictor(), schedule, z, condition)
    torch.testing.assert_close(shorter[0], pair[0])
    # The latent two below the top, on the way up, is what the formula gives on the way down.
    path = _belm_path(model, work)
    torch.testing.assert_close(lower, path[n - 1], rtol=1e-3, atol=1e-3)


def _belm_path(model, work):
    """O-BELM inversion as a plain loop over alpha-scaled latents, all points kept."""
    z, condition, schedule = work
    a = [float(schedule.alpha_prev_S[0]), *schedule.alpha_S.tolist()]
    s = [float(schedule.sigma_prev_S[0]) / a[0], *(schedule.sigma_S / schedule.alpha_S).tolist()]
    with torch.no_grad():
        first = a[1] * (z / a[0] + (s[1] - s[0]) * model.predictor()(z, schedule.t_S[0].expand(3), condition))
        path = [z, first]
        for i in range(1, STEPS):
            h, h_next = s[i] - s[i - 1], s[i + 1] - s[i]
            eps = model.predictor()(path[i], schedule.t_S[i - 1].expand(3), condition)
            known = path[i - 1] / a[i - 1] - (1 - h**2 / h_next**2) * path[i] / a[i] + h * (h + h_next) / h_next * eps
            path.append(a[i + 1] * h_next**2 / h**2 * known)
    return path


def test_edict_is_undone_by_its_sampler(model, work) -> None:
    z, condition, schedule = work
    x, y = exact_pair.edict_invert(model.predictor(), schedule, z, condition)
    assert (x - y).abs().max() > 1e-6
    # The published sampling equations, written out; whose turn it is alternates, as in the authors' code.
    for k in range(STEPS - 1, -1, -1):
        phi = float(schedule.alpha_prev_S[k] / schedule.alpha_S[k])
        psi = float(schedule.sigma_prev_S[k]) - phi * float(schedule.sigma_S[k])
        t = schedule.t_S[k].expand(3)
        with torch.no_grad():
            if (STEPS - 1 - k) % 2 == 0:
                x_mid = phi * x + psi * model.predictor()(y, t, condition)
                y_mid = phi * y + psi * model.predictor()(x_mid, t, condition)
            else:
                y_mid = phi * y + psi * model.predictor()(x, t, condition)
                x_mid = phi * x + psi * model.predictor()(y_mid, t, condition)
        x = 0.93 * x_mid + 0.07 * y_mid
        y = 0.93 * y_mid + 0.07 * x
    torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-3)
    pair = exact_pair.edict_invert(model.predictor(), schedule, z, condition)
    torch.testing.assert_close(
        exact_pair.edict_generate(model.predictor(), schedule, pair, condition), x, rtol=1e-4, atol=1e-4
    )
