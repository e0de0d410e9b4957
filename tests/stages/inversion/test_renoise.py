"""ReNoise against a plain loop."""

from __future__ import annotations

from stages.inversion.renoise import ReNoise
from tests.stages.inversion.plain import check


def renoise(z_prev, eps, t, phi, psi, a, b):
    first = (z_prev - psi * eps(z_prev)) / phi
    second = (z_prev - psi * eps(first)) / phi
    return (first + second) / 2 if t < 250 else second


def test_the_rule_is_its_formula(model, work) -> None:
    check(model, work, ReNoise(), renoise)
