"""Inversion of samplers whose steps hang together: the seed that diffusers' own sampler made a latent of is found."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from stages.engine.solver import solve
from stages.inversion.fixed_point import Anderson, FixedPoint
from stages.inversion.lbo import LatentBias
from stages.inversion.schemes import check_method
from stages.inversion.settings import FixedPointMethod, LboMethod, RenoiseMethod
from stages.inversion.sweeps import SweepProblem
from stages.models.multistep import Multistep
from stages.models.stock_schedule import stock_schedule
from tests.stages.inversion.plain import CONFIG, SHAPE, rows_of

SAMPLERS: dict[str, dict[str, Any]] = {
    "2M": {"_class_name": "DPMSolverMultistepScheduler"},
    "2M, Karras": {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    "2M, heun": {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun", "timestep_spacing": "trailing"},
    "3M": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
    "2M, v": {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"},
    "UniPC": {"_class_name": "UniPCMultistepScheduler"},
    "UniPC, v": {"_class_name": "UniPCMultistepScheduler", "prediction_type": "v_prediction"},
    "PLMS": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": "leading"},
    "PNDM": {"_class_name": "PNDMScheduler", "timestep_spacing": "leading"},
    "DEIS": {"_class_name": "DEISMultistepScheduler"},
    "LMS": {"_class_name": "LMSDiscreteScheduler", "timestep_spacing": "leading"},
    "2S": {"_class_name": "DPMSolverSinglestepScheduler"},
    "Heun": {"_class_name": "HeunDiscreteScheduler", "timestep_spacing": "leading"},
    "KDPM2": {"_class_name": "KDPM2DiscreteScheduler", "timestep_spacing": "leading"},
}


def sampler_of(name: str, steps: int) -> Multistep:
    sampler = stock_schedule({**CONFIG, **SAMPLERS[name]}, steps)
    assert isinstance(sampler, Multistep)
    return sampler


def drawn(model, name: str, steps: int, seed: torch.Tensor, condition, guidance: float = 1.0) -> torch.Tensor:
    """What diffusers' own sampler makes of a seed."""
    config = {**CONFIG, **SAMPLERS[name]}
    sampler = getattr(diffusers, config["_class_name"]).from_config(config)
    sampler.set_timesteps(steps)
    latents, predict = seed * sampler.init_noise_sigma, model.predictor(guidance)
    for t in sampler.timesteps:
        shown = sampler.scale_model_input(latents, t)
        with torch.no_grad():
            m = predict(shown, t.expand(len(seed)), condition)
        latents = sampler.step(m, t, latents).prev_sample
    return latents


def inverted(model, name: str, steps: int, z, condition, rule, slots: int = 2, guidance: float = 1.0):
    problem = SweepProblem(model.predictor(guidance), sampler_of(name, steps), rule, slots=slots, latent_shape=SHAPE)
    return sorted(solve(problem, rows_of(z, condition)), key=lambda row: row["id"])


@pytest.mark.parametrize(("name", "steps"), [*((name, 6) for name in SAMPLERS), ("2M", 15), ("PLMS", 15)])
def test_the_seed_of_a_drawn_latent_is_found(model, work, name: str, steps: int) -> None:
    """Three rows in two slots, so that rows at different places of different sweeps share the network's calls."""
    _, condition, _ = work
    seed = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(steps))
    z = drawn(model, name, steps, seed, condition)
    rows = inverted(model, name, steps, z, condition, LatentBias(tolerance=1e-5))
    found = torch.stack([row["noise"] for row in rows])
    assert [row.get("error") for row in rows] == [None] * 3
    assert all(row["residual"].shape == (len(sampler_of(name, steps)),) for row in rows)
    assert all(float(row["residual"].max()) <= 1e-5 for row in rows)
    torch.testing.assert_close(found, seed, rtol=0, atol=5e-4)
    again = drawn(model, name, steps, found, condition)
    assert float((again - z).square().mean()) < 1e-8 * float(z.square().mean())


def test_rows_do_not_touch_each_other(model, work) -> None:
    _, condition, _ = work
    z = drawn(model, "2M", 4, torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(4)), condition)
    together = inverted(model, "2M", 4, z, condition, Anderson(3, 1e-3), slots=3)
    own = {name: value[1:2] for name, value in condition.items()}
    (alone,) = inverted(model, "2M", 4, z[1:2], own, Anderson(3, 1e-3), slots=1)
    torch.testing.assert_close(alone["noise"], together[1]["noise"], rtol=0, atol=1e-4)
    assert alone["forwards"] == together[1]["forwards"]


def test_passes_are_counted(model, work) -> None:
    _, condition, _ = work
    z = drawn(model, "PLMS", 4, torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(4)), condition)
    calls, predict = [], model.predictor()

    def counted(z_BCHW, t_B, told):
        calls.append(len(z_BCHW))
        return predict(z_BCHW, t_B, told)

    problem = SweepProblem(counted, sampler_of("PLMS", 4), Anderson(6, 1e-3), slots=1, latent_shape=SHAPE)
    (row,) = solve(problem, rows_of(z, condition)[:1])
    assert row["forwards"] == len(calls)


def test_a_row_that_does_not_settle_has_failed(work) -> None:
    """A network that answers the finest change: no sweep agrees with the one before."""
    z, condition, _ = work

    def restless(z_BCHW, t_B, told):
        return torch.sin(1e4 * z_BCHW)

    problem = SweepProblem(restless, sampler_of("2M", 4), FixedPoint(2, 1e-6), slots=3, latent_shape=SHAPE)
    for row in solve(problem, rows_of(z, condition)):
        assert row["status"] == "failed"
        assert "does not settle: after 12 sweeps the point at time" in row["error"]
        assert "leave `sampler` out" in row["error"]


@pytest.mark.parametrize(
    "method", [RenoiseMethod(), FixedPointMethod(), LboMethod(replay=True), LboMethod(tolerance=0)]
)
def test_methods_that_undo_step_by_step_are_refused(model, method) -> None:
    geometry = model.geometry
    with pytest.raises(
        ValueError, match=f"method {method.label} undoes .* one by one.*take method lbo, or fixed-point"
    ):
        check_method(method, geometry, sampler_of("2M", 4))
    check_method(method, geometry, stock_schedule({**CONFIG, "_class_name": "EulerDiscreteScheduler"}, 4))
    for able in (LboMethod(), FixedPointMethod(tolerance=1e-3)):
        check_method(able, geometry, sampler_of("2M", 4))
