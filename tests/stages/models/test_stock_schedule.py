"""Schedules of stock samplers: under the same network, diffusers' own sampler gives the same latents at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.models.latent import Condition
from stages.models.multistep import Multistep
from stages.models.sampler import denoise
from stages.models.settings import VP_SCHEDULERS
from stages.models.stock_schedule import MULTISTEP_SAMPLERS, STOCK_SAMPLERS, stock_schedule

SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "steps_offset": 1, "clip_sample": False,
}  # fmt: skip


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
    return {**SD, "_class_name": name, **given}


def check(config: dict[str, Any], steps: int) -> None:
    if config["_class_name"] == "DPMSolverMultistepScheduler":
        config = {**config, "solver_order": 1}
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


SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "2M": ("DPMSolverMultistepScheduler", {}),
    "2M heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun", "lower_order_final": False}),
    "2M euler at final": ("DPMSolverMultistepScheduler", {"euler_at_final": True, "use_karras_sigmas": True}),
    "2M sigma_min": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    "2, dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "3M": ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_exponential_sigmas": True}),
    "2M, lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC 3, bh1, no corrector at first": (
        "UniPCMultistepScheduler", 
        {"solver_order": 3, "solver_type": "bh1", "disable_corrector": [0], "final_sigmas_type": "sigma_min"},
    ),
    "UniPC, Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM": ("PNDMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS, Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
}  # fmt: skip


def trajectory(
    config: dict[str, Any], steps: int, seed: torch.Tensor
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """The times, the points that diffusers' pipelines show the network, and the last latents."""
    import diffusers

    sampler = getattr(diffusers, config["_class_name"]).from_config(config)
    sampler.set_timesteps(steps)
    latents, points = seed * sampler.init_noise_sigma, []
    for t in sampler.timesteps:
        points.append(sampler.scale_model_input(latents, t))
        latents = sampler.step(network(points[-1], t.expand(len(seed)), {}), t, latents).prev_sample
    return sampler.timesteps.tolist(), torch.stack(points), latents


@pytest.mark.parametrize(
    ("spacing", "prediction"), [("leading", "epsilon"), ("trailing", "v_prediction"), ("linspace", "epsilon")]
)
@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("name", list(SEVERAL))
def test_points_of_samplers_whose_steps_hang_together_are_theirs(
    name: str, steps: int, spacing: str, prediction: str
) -> None:
    """Down from the seed, and up from the picture given the outputs."""
    kind, given = SEVERAL[name]
    config = config_of(kind, **given, timestep_spacing=spacing, prediction_type=prediction)
    seed = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(steps))
    times, points, last = trajectory(config, steps, seed)
    sampler = stock_schedule(config, steps)
    assert isinstance(sampler, Multistep)
    assert sampler.t_S.flip(0).tolist() == times
    made = [*denoise(network, sampler, seed, {})]
    size = points.abs().max()
    for mine, theirs in zip([seed, *made], [seed, *points[1:], last], strict=True):
        torch.testing.assert_close(mine / size, theirs / size, rtol=1e-5, atol=1e-5)
    shown = zip(points.flip(0), sampler.t_S, strict=True)
    outputs = torch.stack([network(x, t.expand(2), {}) for x, t in shown], 1)
    up = sampler.points(last, outputs)
    torch.testing.assert_close(up / size, points.flip(0).transpose(0, 1) / size, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampler.seed(last, outputs), seed, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "given", "steps", "said"),
    [
        ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}, 5, "keeps nothing of the latent it starts from"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, 10, "not finite of 10 steps, in its pipeline too"),
        ("PNDMScheduler", {}, 2, "PNDMScheduler cannot make 2 steps"),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}, 50, "cannot make 50 steps"),  # nor can diffusers
        ("UniPCMultistepScheduler", {}, 1001, "between 1 and 1000"),
    ],
)
def test_steps_that_cannot_be_made_or_undone_are_refused(
    name: str, given: dict[str, Any], steps: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        stock_schedule({**SD, "_class_name": name, **given}, steps)


@pytest.mark.parametrize("name", sorted(set(VP_SCHEDULERS) - set(STOCK_SAMPLERS + MULTISTEP_SAMPLERS)))
def test_every_other_class_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler: model: the model's {name} .*leave `sampler` out"):
        stock_schedule(config_of(name), 10)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
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
