"""The forward step of exact inversion against a plain loop."""

from __future__ import annotations

from stages.inversion.exact import Exact
from tests.stages.inversion.plain import check


def exact(z_prev, eps, t, phi, psi, a, b, iterations=6, warmup=3):
    z = (z_prev - psi * eps(z_prev)) / phi
    for i in range(1, iterations + 1):
        residual = phi * z + psi * eps(z) - z_prev
        if residual.square().sum() <= 1e-3:
            return z
        z = z - 0.5 * min(i / warmup, 1.0) * residual
    return z


def test_the_rule_is_its_formula(model, work) -> None:
    check(model, work, Exact(iterations=6, warmup=3), exact)
