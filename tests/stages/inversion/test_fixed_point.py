"""Fixed-point inversion and its accelerations against plain loops, Anderson's in float64."""

from __future__ import annotations

import pytest
import torch

from stages.inversion.fixed_point import Anderson, Averaged, FixedPoint
from stages.models.sampler import sample
from tests.stages.inversion.plain import check, run


def plain(z_prev, eps, t, phi, psi, a, b, iterations=4):
    z = z_prev
    for _ in range(iterations + 1):
        z = (z_prev - psi * eps(z)) / phi
    return z


def averaged(z_prev, eps, t, phi, psi, a, b, iterations=4):
    values, z = [], z_prev
    for _ in range(iterations + 1):
        values.append((z_prev - psi * eps(z)) / phi)
        z = sum(values[-2:]) / len(values[-2:])
    return z


def anderson(z_prev, eps, t, phi, psi, a, b, iterations=4, window=2):
    xs, gs, z = [], [], z_prev
    for _ in range(iterations + 1):
        xs.append(z.double().flatten())
        gs.append(((z_prev - psi * eps(z)) / phi).double().flatten())
        f = [g - x for x, g in zip(xs, gs, strict=True)][-window - 1 :]
        g = gs[-window - 1 :]
        if len(f) == 1:
            new = g[-1]
        else:
            differences = torch.stack([f[-1] - other for other in f[:-1]], 1)
            theta = torch.linalg.lstsq(differences, f[-1][:, None]).solution[:, 0]
            new = g[-1] - torch.stack([g[-1] - other for other in g[:-1]], 1) @ theta
        z = new.float().view_as(z_prev)
    return z


@pytest.mark.parametrize(
    ("rule", "reference"),
    [(FixedPoint(4), plain), (Averaged(4), averaged), (Anderson(4, window=2), anderson)],
    ids=["fixed-point", "averaged", "anderson"],
)
def test_a_rule_is_its_formula(model, work, rule, reference) -> None:
    check(model, work, rule, reference)


def test_rows_are_independent_of_their_company(model, work) -> None:
    rule = Anderson(9, tolerance=1e-4)
    together, alone = run(model, work, rule, slots=3), run(model, work, rule, slots=1)
    for one, other in zip(together, alone, strict=True):
        assert one["forwards"] == other["forwards"]
        torch.testing.assert_close(one["noise"], other["noise"], rtol=1e-4, atol=1e-5)
    assert all(row["residual"].max() <= 1e-4 or row["forwards"] >= 10 for row in together)


def test_a_converged_seed_regenerates_its_latent_under_guidance(model, work) -> None:
    z, condition, schedule = work
    rule = Anderson(150, window=8, tolerance=3e-6)
    found = run(model, work, rule, guidance=2.0)
    assert all(float(row["residual"].max()) <= 3e-6 for row in found)
    seeds = torch.stack([row["noise"] for row in found])
    again = sample(model.predictor(2.0), schedule, seeds, condition)
    torch.testing.assert_close(again, z, rtol=1e-3, atol=2e-3)
