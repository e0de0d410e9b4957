"""Methods of one evaluation a step."""

from __future__ import annotations

import torch

from stages.engine.solver import solve
from stages.inversion.engine import InversionProblem
from stages.inversion.explicit import Ddim, UniInv
from stages.inversion.lbo import LatentBias
from stages.models.schedule import ddim_schedule
from tests.stages.inversion.plain import CONFIG, STEPS, check, rows_of, run


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


def test_uni_inv_is_its_formula_and_lbo_of_one_pass_from_the_last_output() -> None:
    mixing = torch.randn((32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 8
    z = torch.randn((3, 2, 4, 4), generator=torch.Generator().manual_seed(4))
    schedule = ddim_schedule(CONFIG, STEPS)

    def predict(z, t, condition):
        return torch.tanh(z.double().flatten(1) @ mixing + t.double()[:, None] / 1000).view_as(z).to(z.dtype)

    wanted, last = z.double(), None
    for k in range(STEPS):
        a, b = float(schedule.alpha_S[k]), float(schedule.alpha_prev_S[k])
        phi, psi = b / a, (1 - b * b) ** 0.5 - b / a * (1 - a * a) ** 0.5
        point = wanted if last is None else (wanted - psi * last) / phi
        last = predict(point, schedule.t_S[k].expand(3), {})
        wanted = (wanted - psi * last) / phi

    for rule in (UniInv(), LatentBias(bias="input", warm_start="last", passes=1, tolerance=0.0)):
        problem = InversionProblem(predict, schedule, rule, slots=2, latent_shape=(2, 4, 4))
        done = sorted(solve(problem, rows_of(z, {})), key=lambda row: row["id"])
        found = torch.stack([row["noise"] for row in done])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        assert all(row["forwards"] == STEPS for row in done)
