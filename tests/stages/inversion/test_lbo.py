"""Latent Bias Optimization: every update against its formula, the warm start, the fallback, and replay."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from stages.engine.solver import solve
from stages.inversion.engine import FixedPoint, InversionProblem, generate
from stages.inversion.lbo import LatentBias, replay_bias
from stages.models.schedule import ddim_schedule

SHAPE = (2, 4, 4)
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
N = 32


def network(strength: float):
    """A smooth stand-in for a U-Net: every output depends on every input, the more the larger `strength`."""
    mixing = torch.randn((N, N), generator=torch.Generator().manual_seed(3)) * strength / N**0.5

    def predict(z, t, condition):
        return torch.tanh(z.flatten(1) @ mixing + condition["c"] + t.float()[:, None] / 1000).view_as(z)

    return predict


def rows(count: int = 4):
    z = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(4))
    c = torch.randn((count, N), generator=torch.Generator().manual_seed(5)) * 0.3
    return [{"id": str(i), "z": z[i], "condition": {"c": c[i]}} for i in range(count)]


def invert(rule, *, strength=0.8, steps=6, slots=3, **options):
    schedule = ddim_schedule(CONFIG, steps)
    problem = InversionProblem(network(strength), schedule, rule, slots=slots, latent_shape=SHAPE, **options)
    done = sorted(solve(problem, rows()), key=lambda row: row["id"])
    condition = {"c": torch.stack([row["condition"]["c"] for row in done])}
    seeds = torch.stack([row["seed"] for row in done])
    again = generate(network(strength), schedule, seeds, condition)
    error = (again - torch.stack([row["z"] for row in done])).flatten(1).norm(dim=1)
    passes = sum(row["forwards"] + row["backwards"] for row in done) / len(done) / steps
    return done, float(error.max()), passes


@pytest.mark.parametrize("bias", ["output", "input"])
@pytest.mark.parametrize("update", ["safeguarded", "anderson", "gauss-newton", "jacobian-free"])
def test_every_update_comes_nearer_than_ddim_within_its_budget(bias, update) -> None:
    _, ddim, _ = invert(partial(FixedPoint, iterations=1))
    _, error, passes = invert(partial(LatentBias, bias=bias, update=update, passes=12, tolerance=0.0))
    assert error < ddim / 2, (error, ddim)
    assert passes <= 12


def test_a_warm_start_beats_anderson_at_equal_passes() -> None:
    _, anderson, spent = invert(partial(FixedPoint, iterations=2, acceleration="anderson"), steps=20)
    _, biased, passes = invert(partial(LatentBias, update="anderson", passes=3, tolerance=0.0), steps=20)
    assert passes == spent == 3
    assert biased < anderson


@pytest.mark.parametrize("start", ["none", "last", "linear"])
def test_the_first_point_carries_the_last_output(start) -> None:
    schedule = ddim_schedule(CONFIG, 4)
    rule = LatentBias(1, SHAPE, torch.device("cpu"), warm_start=start, passes=1, tolerance=0.0)
    outputs = torch.randn((3, 1, *SHAPE), generator=torch.Generator().manual_seed(6))
    z = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(7))
    yes, no = torch.tensor([True]), torch.tensor([False])
    problem_points = []
    for k in range(3):
        step = schedule.at(torch.tensor([k]))
        problem_points.append(rule.begin(yes, yes if k == 0 else no, z, step))
        # The row ends the step at the point that this output gives.
        z_next = step.up(z, outputs[k])
        from stages.inversion.engine import Look

        look = Look(problem_points[-1], outputs[k], z, step, torch.tensor([1.0]), yes, None)
        rule._carry(look, yes, z_next)
        z = z_next
    step = schedule.at(torch.tensor([3]))
    point = rule.begin(yes, no, z, step)
    foreseen = {"none": None, "last": outputs[2], "linear": 2 * outputs[2] - outputs[1]}[start]
    wanted = z if foreseen is None else step.up(z, foreseen)
    torch.testing.assert_close(point, wanted, rtol=1e-3, atol=1e-3)


def test_each_row_stops_by_itself() -> None:
    done, _, _ = invert(partial(LatentBias, tolerance=1e-4, passes=40))
    assert all(float(row["residual"].max()) <= 1e-4 for row in done)
    assert len({row["forwards"] for row in done}) > 1


def test_where_the_fixed_point_expands_the_gradient_helps() -> None:
    strong = {"strength": 6.0, "steps": 4}
    _, plain, _ = invert(partial(FixedPoint, iterations=40), **strong)
    done, safe, _ = invert(partial(LatentBias, passes=40, tolerance=1e-5), **strong)
    assert safe < plain / 2, (safe, plain)
    assert sum(row["backwards"] for row in done) > 0


def test_one_gauss_newton_step_is_a_line_search_along_the_gradient() -> None:
    schedule = ddim_schedule(CONFIG, 3)
    rule = partial(LatentBias, update="gauss-newton", bias="output", warm_start="none", passes=4, tolerance=0.0)
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
    torch.testing.assert_close(row["seed"], z[0], rtol=1e-3, atol=1e-4)
    assert (row["forwards"], row["backwards"]) == (9, 3)


def test_adam_is_torchs_adam_on_the_residual() -> None:
    schedule = ddim_schedule(CONFIG, 3)
    rule = partial(LatentBias, update="adam", bias="output", warm_start="none", passes=7, tolerance=0.0)
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
    torch.testing.assert_close(row["seed"], z[0], rtol=1e-3, atol=1e-4)
    assert (row["forwards"], row["backwards"]) == (12, 9)


def test_replay_gives_the_inverted_latent_back() -> None:
    done, error, _ = invert(partial(LatentBias, passes=1, tolerance=0.0, warm_start="none"), keep_path=True)
    schedule = ddim_schedule(CONFIG, 6)
    condition = {"c": torch.stack([row["condition"]["c"] for row in done])}
    path = torch.stack([row["path"] for row in done])
    bias = replay_bias(network(0.8), schedule, path, condition)
    again = generate(network(0.8), schedule, path[:, -1], condition, bias)
    assert error > 1e-3
    torch.testing.assert_close(again, path[:, 0], rtol=1e-4, atol=1e-4)


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        LatentBias(1, SHAPE, torch.device("cpu"), bias="output", update="adam", passes=2)
