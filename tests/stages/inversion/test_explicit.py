"""Methods of one evaluation a step."""

from __future__ import annotations

import torch

from stages.inversion.explicit import Ddim
from tests.stages.inversion.plain import CONFIG, STEPS, check, run


def ddim(z, eps, t, phi, psi, a, b):
    return (z - psi * eps(z)) / phi


def test_the_rule_is_its_formula(model, work) -> None:
    check(model, work, Ddim(), ddim)


def test_ddim_is_diffusers_inverse_scheduler(model, work) -> None:
    from diffusers import DDIMInverseScheduler

    z, condition, _schedule = work
    scheduler = DDIMInverseScheduler.from_config({**CONFIG, "clip_sample": False})
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        with torch.no_grad():
            z = scheduler.step(model.predictor()(z, t.expand(3), condition), int(t), z).prev_sample
    seeds = torch.stack([row["noise"] for row in run(model, work, Ddim())])
    assert (seeds - z).abs().max() < 1e-4
