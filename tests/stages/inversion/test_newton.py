"""Newton-Raphson inversion against a plain loop with autograd."""

from __future__ import annotations

import torch

from stages.inversion.newton import Newton
from tests.stages.inversion.plain import check


def newton(z_prev, eps, t, phi, psi, a, b, iterations=2, prior=0.1):
    z, best, score = z_prev, None, float("inf")
    for i in range(iterations + 1):
        z = z.detach().requires_grad_(True)
        g = (z_prev - psi * eps(z)) / phi
        mismatch = (g - z).abs().sum()
        if mismatch.item() < score:
            best, score = g.detach(), mismatch.item()
        if i == iterations:
            break
        value = mismatch + prior / (1 - a * a) * ((z - a / b * z_prev).square().sum() + 1e-12).sqrt()
        (slope,) = torch.autograd.grad(value, z)
        z = z - value * slope / (z.numel() * (slope**2 + slope.square().mean()))
    return best


def test_the_rule_is_its_formula(model, work) -> None:
    check(model, work, Newton(), newton)
