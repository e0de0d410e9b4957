"""Schedules of stock samplers: under the same network, diffusers' own sampler gives the same latents at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.models.latent import Condition
from stages.models.sampler import denoise
from stages.models.settings import VP_SCHEDULERS
from stages.models.stock_schedule import STOCK_SAMPLERS, stock_schedule

SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
ORDER_1 = {"DPMSolverMultistepScheduler": {"solver_order": 1}}


def network(z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
    t = t_B.to(z_BCHW.dtype).view(-1, 1, 1, 1) / 1000
    return torch.tanh(z_BCHW.roll(1, -1) * (1 + t)) + 0.3 * z_BCHW * t


def loop(config: dict[str, Any], steps: int, seed: torch.Tensor) -> list[torch.Tensor]:
    """What diffusers' pipelines do with a seed: the latents after each step."""
    import diffusers

    sampler = getattr(diffusers, config["_class_name"]).from_config(config)
    sampler.set_timesteps(steps)
    latents, made = seed * sampler.init_noise_sigma, []
    for t in sampler.timesteps:
        shown = sampler.scale_model_input(latents, t)
        latents = sampler.step(network(shown, t.expand(len(seed)), {}), t, latents).prev_sample
        level = getattr(sampler, "sigmas", None)
        # Euler's latents are z / alpha but for the last, which is decoded as it is.
        euler = config["_class_name"] == "EulerDiscreteScheduler" and len(made) < steps - 1
        made.append(latents / (1 + level[len(made) + 1] ** 2) ** 0.5 if euler else latents)
    return made


def config_of(name: str, **given: Any) -> dict[str, Any]:
    return {**SD, "_class_name": name, **ORDER_1.get(name, {}), **given}


def check(config: dict[str, Any], steps: int) -> None:
    seed = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(steps))
    schedule = stock_schedule(config, steps)
    # Euler's float32 latents are z / alpha, rounded in the size of that: 4096 z where the signal ends at (almost) zero.
    near = max(1e-5, 1e-7 / float(schedule.alpha_S[-1]))
    for made, wanted in zip(denoise(network, schedule, seed, {}), loop(config, steps, seed), strict=True):
        torch.testing.assert_close(made / wanted.std(), wanted / wanted.std(), rtol=near, atol=near)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        *((name, spacing) for name in STOCK_SAMPLERS for spacing in ("leading", "trailing")),
        ("EulerDiscreteScheduler", "linspace"),
        ("DPMSolverMultistepScheduler", "linspace"),
    ],
)
def test_latents_are_those_of_the_sampler(name: str, spacing: str, steps: int, prediction: str) -> None:
    check(config_of(name, timestep_spacing=spacing, prediction_type=prediction), steps)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(
    "given",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
)
def test_every_grid_of_noise_levels_is_the_sampler_s(name: str, steps: int, given: dict[str, Any]) -> None:
    check(config_of(name, **given), steps)


def test_a_seed_at_order_1_with_the_first_form_of_the_solver_too() -> None:
    check(config_of("DPMSolverMultistepScheduler", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), 10)


@pytest.mark.parametrize("name", sorted(set(VP_SCHEDULERS) - set(STOCK_SAMPLERS)))
def test_every_other_class_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler: model: the model's {name} .*leave `sampler` out"):
        stock_schedule(config_of(name), 10)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 2},
            "of solver_order 2 makes a step of the outputs",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "adds fresh noise"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding has no inverse"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas has no inverse"),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample has no inverse; set scheduler: {clip_sample: false}"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "leaves gaps"),
    ],
)
def test_settings_without_an_inverse_are_refused(name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stock_schedule(config_of(name, **given), 10)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        stock_schedule(config_of("EulerDiscreteScheduler"), 1001)
