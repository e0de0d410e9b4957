"""Newton-Raphson inversion against a plain loop that lets autograd differentiate, as the authors' code does."""

from __future__ import annotations

import pytest
import torch

from stages.inversion.engine import Evaluation
from stages.inversion.newton import Newton
from tests.stages.inversion.plain import check


@pytest.mark.parametrize("iterations", [2, 4])
def test_the_rule_is_the_authors_loop(model, work, iterations) -> None:
    start = {}

    def newton(z_prev, eps, t, phi, psi, a, b, prior=0.1):
        if b * b > 0.999:  # the first step: z_prev is z_0
            start["z_0"] = z_prev
        z, best, score = z_prev, None, float("inf")
        for _ in range(iterations):
            z = z.detach().requires_grad_(True)
            with torch.no_grad():
                g = (z_prev - psi * eps(z.detach())) / phi
            log_density = -0.5 * ((g - a * start["z_0"]) / (1 - a * a) ** 0.5) ** 2
            value = ((g - z).abs() - prior * log_density).sum()
            if value.item() < score:
                best, score = g, value.item()
            (slope,) = torch.autograd.grad(value, z)
            z = z - value / slope / z.numel()
        return best

    check(model, work, Newton(iterations), newton)


def test_a_coordinate_that_has_arrived_stays_finite(model, work) -> None:
    z, _, schedule = work
    rule = Newton(3)
    step = schedule.at(torch.tensor([1, 2, 3]))
    x, state = rule.begin(z, step, rule.blank(z))
    m = (z - step.scale * z) / step.weight  # g(z) = z, but for rounding
    point = Evaluation(rule, x, m, z, step, torch.zeros_like(z), torch.zeros(3), torch.tensor([1, 1, 1]))
    assert rule.update(point, state)[0].isfinite().all()
