"""Schedule coefficients against diffusers' own schedulers, step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from stages.models.schedule import ddim_schedule, noise_levels

SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 50])
def test_down_and_up_are_diffusers_steps(prediction: str, spacing: str, steps: int) -> None:
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
    down = DDIMScheduler.from_config({**config, "clip_sample": False})
    up = DDIMInverseScheduler.from_config({**config, "clip_sample": False})
    down.set_timesteps(steps)
    up.set_timesteps(steps)
    schedule = ddim_schedule(config, steps)
    generator = torch.Generator().manual_seed(0)
    assert schedule.t_S.tolist() == down.timesteps.tolist()[::-1]
    for k in range(steps):
        z, m = torch.randn((2, 1, 4, 4, 4), generator=generator)
        step = schedule.at(torch.tensor([k]))
        t = int(schedule.t_S[k])
        torch.testing.assert_close(step.down(z, m), down.step(m, t, z).prev_sample, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(step.explicit(z, m), up.step(m, t, z).prev_sample, rtol=2e-4, atol=2e-5)
        back = step.up(step.down(z, m), m)
        torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-4)


def test_zero_signal_is_finite_for_v_and_refused_for_epsilon() -> None:
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = ddim_schedule({**config, "prediction_type": "v_prediction"}, 10)
    assert float(schedule.alpha_S[-1]) == 0
    assert schedule.weight_S.isfinite().all()
    with pytest.raises(ValueError, match="zero signal"):
        ddim_schedule(config, 10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_single_step_that_keeps_nothing_of_the_noise_is_refused(prediction: str) -> None:
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    with pytest.raises(ValueError, match=r"zero signal or zero noise.*take more steps"):
        ddim_schedule({**config, "set_alpha_to_one": True}, 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 30, 50, 600])
def test_a_chain_has_no_gaps_or_is_refused(spacing: str, steps: int) -> None:
    """Where each step ends the next one starts, in diffusers' own DDIM; rounding of `trailing` may be off by one."""
    from diffusers import DDIMScheduler

    config = {**SD, "timestep_spacing": spacing}
    sampler = DDIMScheduler.from_config(config)
    sampler.set_timesteps(steps)
    t, step = sampler.timesteps.tolist(), 1000 // steps
    gaps = [abs(now - step - following) for now, following in pairwise(t)]
    if max(gaps, default=0) > (1 if spacing == "trailing" and steps <= 100 else 0):
        with pytest.raises(ValueError, match=f"timestep_spacing {spacing} .* leaves gaps of up to {max(gaps)}"):
            ddim_schedule(config, steps)
        return
    schedule = ddim_schedule(config, steps)
    assert schedule.t_S.tolist() == t[::-1]
    moved = (schedule.alpha_prev_S[1:] - schedule.alpha_S[:-1]).abs()
    assert float(moved.max() if len(moved) else 0) < 5e-3


def test_a_number_of_steps_that_diffusers_rounds_into_one_more_is_refused() -> None:
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler.from_config({**SD, "timestep_spacing": "trailing"})
    sampler.set_timesteps(61)
    assert (len(sampler.timesteps), int(sampler.timesteps.min())) == (62, -1)
    with pytest.raises(ValueError, match="visit 62 times, one of them negative; take 60 or 62"):
        ddim_schedule({**SD, "timestep_spacing": "trailing"}, 61)


def test_steps_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        ddim_schedule(SD, 0)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        ddim_schedule(SD, 1001)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, "noise levels are not understood here"),
        ({}, "has no beta_start"),
        ({**SD, "beta_schedule": "sigmoid"}, "'sigmoid' is none of linear, scaled_linear"),
    ],
)
def test_what_is_no_chain_of_betas_is_refused_and_not_read_as_one(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ddim_schedule(config, 10)


def test_noise_levels_are_the_scheduler_s_own() -> None:
    from diffusers import PNDMScheduler

    wanted = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    assert torch.equal(noise_levels({**SD, "_class_name": "PNDMScheduler"}), wanted)
    with pytest.raises(ValueError, match="a flow has no noise-prediction loss"):
        noise_levels({"_class_name": "FlowMatchEulerDiscreteScheduler"})
