"""Diffusion inversion against diffusers and plain one-image loops, on a small smooth network."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from stages.exact_pair import belm_generate, belm_invert, edict_generate, edict_invert
from stages.inversion import Ddim, Exact, FixedPoint, InversionProblem, Newton, ReNoise, generate
from stages.lbo import LatentBias
from stages.schedule import make_schedule
from stages.solver import solve

CONFIG = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
    "prediction_type": "epsilon", "timestep_spacing": "leading",
}  # fmt: skip
SHAPE = (4, 6, 6)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(16, 4, 3, padding=1)
    ).requires_grad_(False)

    def predict(z_BCHW, t_B, condition):
        bent = layers(z_BCHW) * (0.5 + t_B.view(-1, 1, 1, 1) / 2000)
        return 0.8 * z_BCHW + bent + condition["shift"].view(-1, 1, 1, 1)

    return predict


def latents(count, seed=1):
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed))


def invert(network, rule, steps, z_BCHW, slots=3, shift=0.1):
    schedule = make_schedule(CONFIG, steps)
    problem = InversionProblem(network, schedule, rule, slots=slots, latent_shape=SHAPE)
    rows = [
        {"id": str(i), "z": z, "condition": {"shift": torch.tensor(shift * i)}} for i, z in enumerate(z_BCHW)
    ]
    done = {row["id"]: row for row in solve(problem, rows)}
    return schedule, [done[str(i)] for i in range(len(z_BCHW))]


def condition(count, shift=0.1):
    return {"shift": shift * torch.arange(count).float()}


def error(network, schedule, rows, z_BCHW):
    seeds = torch.stack([row["seed"] for row in rows])
    return float((generate(network, schedule, seeds, condition(len(rows))) - z_BCHW).norm() / z_BCHW.norm())


def test_generation_is_ddim_of_diffusers(network):
    schedule, z_BCHW = make_schedule(CONFIG, 20), latents(2)
    sampler = DDIMScheduler.from_config(CONFIG)
    sampler.set_timesteps(20)
    theirs = z_BCHW
    for t in sampler.timesteps:
        theirs = sampler.step(network(theirs, t.repeat(2), condition(2)), t, theirs).prev_sample
    ours = generate(network, schedule, z_BCHW, condition(2))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_the_inverse_scheduler_of_diffusers(network, steps):
    z_BCHW = latents(5)
    _, rows = invert(network, Ddim, steps, z_BCHW)
    inverse = DDIMInverseScheduler.from_config(CONFIG, clip_sample=False)
    inverse.set_timesteps(steps)
    for i, row in enumerate(rows):
        z = z_BCHW[i : i + 1]
        for t in inverse.timesteps:
            z = inverse.step(network(z, t[None], {"shift": torch.tensor([0.1 * i])}), t, z).prev_sample
        assert torch.allclose(row["seed"], z[0], atol=1e-4)
        assert row["forwards"] == steps


def plain_fixed_point(network, z, shift, steps, iterations, averaged=False):
    """One picture, straight from the formula z <- (z_prev - psi eps(z, t)) / phi, in float64 coefficients."""
    sampler = DDIMScheduler.from_config(CONFIG)
    sampler.set_timesteps(steps)
    alphas, ratio = sampler.alphas_cumprod.double(), 1000 // steps
    z = z[None]
    for t in reversed(sampler.timesteps.tolist()):
        a = alphas[t]
        before = alphas[t - ratio] if t >= ratio else sampler.final_alpha_cumprod.double()
        phi = (before / a).sqrt()
        psi = (1 - before).sqrt() - (before * (1 - a) / a).sqrt()
        prev, past = z, None
        for _ in range(iterations + 1):
            g = (prev - psi.float() * network(z, torch.tensor([t]), {"shift": torch.tensor([shift])})) / phi.float()
            z, past = (g if past is None or not averaged else (g + past) / 2), g
    return z[0]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_fixed_point_is_the_plain_loop_whatever_the_slots(network, slots):
    z_BCHW = latents(5)
    rule = partial(FixedPoint, iterations=4, tolerance=0.0, acceleration="plain", window=3)
    _, rows = invert(network, rule, 10, z_BCHW, slots)
    for i, row in enumerate(rows):
        assert torch.allclose(row["seed"], plain_fixed_point(network, z_BCHW[i], 0.1 * i, 10, 4), atol=1e-4)
        assert row["forwards"] == 10 * 5


RULES = {
    "fixed-point": partial(FixedPoint, iterations=6, tolerance=0.0, acceleration="plain", window=3),
    "averaged": partial(FixedPoint, iterations=6, tolerance=0.0, acceleration="averaged", window=3),
    "anderson": partial(FixedPoint, iterations=6, tolerance=0.0, acceleration="anderson", window=3),
    "renoise": partial(ReNoise, renoises=3),
    "newton": partial(Newton, iterations=6, prior=0.0),
    "exact": partial(Exact, iterations=60, rate=0.5, warmup=10, tolerance=1e-9),
    "lbo": partial(LatentBias, bias="output", update="anderson", warm_start="last", passes=7, tolerance=0.0, rate=0.1,
                   window=3),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_every_rule_comes_closer_than_ddim(network, name):
    z_BCHW = latents(4)
    schedule, plain = invert(network, Ddim, 10, z_BCHW)
    _, rows = invert(network, RULES[name], 10, z_BCHW)
    assert all(row.get("status") != "failed" for row in rows)
    assert error(network, schedule, rows, z_BCHW) < 0.5 * error(network, schedule, plain, z_BCHW)


@pytest.mark.parametrize("name", ["anderson", "lbo"])
def test_a_row_does_not_depend_on_its_neighbours(network, name):
    z_BCHW = latents(5)
    _, alone = invert(network, RULES[name], 10, z_BCHW, slots=1)
    _, together = invert(network, RULES[name], 10, z_BCHW, slots=4)
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a["seed"], b["seed"], atol=1e-4)


def test_a_row_that_diverges_fails_and_the_others_go_on(network):
    z_BCHW = latents(3)
    z_BCHW[1] = float("inf")
    _, rows = invert(network, Ddim, 10, z_BCHW)
    assert rows[1]["status"] == "failed"
    assert "diverged" in rows[1]["error"]
    _, alone = invert(network, Ddim, 10, latents(3))
    assert torch.allclose(rows[2]["seed"], alone[2]["seed"], atol=1e-6)


@pytest.mark.parametrize(("there", "back"), [(belm_invert, belm_generate), (edict_invert, edict_generate)])
def test_extra_state_schemes_are_exact(network, there, back):
    schedule, z_BCHW = make_schedule(CONFIG, 20), latents(2)
    pair = there(network, schedule, z_BCHW, condition(2))
    again = back(network, schedule, pair, condition(2))
    again = again[0] if isinstance(again, tuple) else again
    assert float((again - z_BCHW).norm() / z_BCHW.norm()) < 1e-3
