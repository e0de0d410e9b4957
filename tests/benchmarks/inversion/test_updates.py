"""The updates of LBO's bias that lost, each against its formula; Adam against torch's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.inversion.updates import UPDATES, ComparedLbo
from stages.engine.solver import solve
from stages.inversion.engine import InversionProblem
from stages.inversion.fixed_point import Anderson, FixedPoint
from stages.models.schedule import ddim_schedule
from tests.stages.inversion.test_lbo import CONFIG, SHAPE, invert, network, rows


@pytest.mark.parametrize("bias", ["output", "input"])
@pytest.mark.parametrize("update", ["anderson", "gauss-newton", "jacobian-free"])
def test_every_update_comes_nearer_than_ddim_within_its_budget(bias, update) -> None:
    _, ddim, _ = invert(FixedPoint(1))
    _, error, passes = invert(UPDATES[update](bias=bias, passes=12, tolerance=0.0))
    assert error < ddim / 2, (error, ddim)
    assert passes <= 12


def test_a_warm_start_beats_anderson_at_equal_passes() -> None:
    _, anderson, spent = invert(Anderson(2), steps=20)
    _, biased, passes = invert(UPDATES["anderson"](passes=3, tolerance=0.0), steps=20)
    assert passes == spent == 3
    assert biased < anderson


def test_one_gauss_newton_step_is_a_line_search_along_the_gradient() -> None:
    schedule = ddim_schedule(CONFIG, 3)
    rule = UPDATES["gauss-newton"](bias="output", warm_start="none", passes=4, tolerance=0.0)
    problem = InversionProblem(network(0.8), schedule, rule, slots=1, latent_shape=SHAPE)
    (row,) = list(solve(problem, rows(1)))
    c = {"c": row["condition"]["c"][None]}
    z = row["z"][None]
    for k in range(3):
        step = schedule.at(torch.tensor([k]))
        x = step.up(z, network(0.8)(z, step.t_B, c)).requires_grad_(True)
        r = step.down(x, network(0.8)(x, step.t_B, c)) - z
        (slope,) = torch.autograd.grad((r**2).sum() / 2, x)
        length = (r**2).sum() / (slope**2).sum()
        trial = x - length * slope
        change = r - (step.down(trial, network(0.8)(trial, step.t_B, c)) - z)
        share = (r * change).sum() / (change**2).sum()
        r_trial = (r - change).norm()
        z = (x - share * length * slope if r_trial <= r.norm() else x).detach()
    torch.testing.assert_close(row["noise"], z[0], rtol=1e-3, atol=1e-4)
    assert (row["forwards"], row["backwards"]) == (9, 3)


def test_adam_is_torchs_adam_on_the_residual() -> None:
    schedule = ddim_schedule(CONFIG, 3)
    rule = UPDATES["adam"](bias="output", warm_start="none", passes=7, tolerance=0.0)
    problem = InversionProblem(network(0.8), schedule, rule, slots=1, latent_shape=SHAPE)
    (row,) = list(solve(problem, rows(1)))
    c, z = {"c": row["condition"]["c"][None]}, row["z"][None]
    for k in range(3):
        step = schedule.at(torch.tensor([k]))
        x = step.up(z, network(0.8)(z, step.t_B, c)).detach().requires_grad_(True)
        adam, best, smallest = torch.optim.Adam([x], lr=0.01), None, float("inf")
        for _ in range(3):
            r = step.down(x, network(0.8)(x, step.t_B, c)) - z
            last = r.norm().item()
            best, smallest = (x.detach().clone(), last) if last < smallest else (best, smallest)
            adam.zero_grad()
            ((r**2).sum() / 2).backward()
            adam.step()
        z = x.detach() if last <= smallest else best
    torch.testing.assert_close(row["noise"], z[0], rtol=1e-3, atol=1e-4)
    assert (row["forwards"], row["backwards"]) == (12, 9)


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        UPDATES["adam"](bias="output", passes=2)
    with pytest.raises(ValueError, match="at least 3"):
        ComparedLbo(fitted_by="adam", bias="output", passes=2)
