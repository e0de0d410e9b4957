"""The schedule of the sampler that a model's own pipeline runs. Where each of its steps has an inverse of its own, they
are a `Schedule`; where they hang together, a `stages.models.multistep.Multistep`.

At the noise level s = sigma / alpha the latents of an Euler step are z / alpha; divided by sqrt(1 + s^2), as the
network is shown them, they are those of DDIM at alpha = 1 / sqrt(1 + s^2), and the step is DDIM's. So is the one of
DPM-Solver++ at order 1 (Lu et al., 2022, section 4.1). What differs is which levels are visited, what the network is
told as the time, and the scale of the first and the last latents; all of it is read off diffusers' sampler.

Legend: S steps, index 0 next to the picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from stages.models.multistep import Multistep, read_multistep
from stages.models.schedule import Schedule, check_config, ddim_schedule, first_order

STOCK_SAMPLERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
"""Those whose step depends on one latent and one output of the network."""
MULTISTEP_SAMPLERS = (
    "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler",
    "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
)  # fmt: skip
"""Those that are deterministic, but make a step of several outputs; so does DPM-Solver++ of orders above 1."""
NOISY = "adds fresh noise at each step, so that no latent regenerates a picture under it"


def stock_schedule(config: Mapping[str, Any], steps: int) -> Schedule | Multistep:
    """The schedule of the sampler that `config` is of.

    Raises:
        ValueError: A sampler, or a setting of it, that has no inverse.
    """
    check_config(config)
    name = config.get("_class_name", "DDIMScheduler")
    if name not in STOCK_SAMPLERS + MULTISTEP_SAMPLERS:
        raise _refusal(f"{name} {NOISY}")
    for key in ("thresholding", "clip_sample", "use_flow_sigmas", "variance_type"):
        if _value(name, config, key):
            raise ValueError(f"sampler: model: {name} with {key} has no inverse; set scheduler: {{{key}: {_OFF[key]}}}")
    if name == "DDIMScheduler":
        return ddim_schedule(config, steps)
    if str(_value(name, config, "algorithm_type")).startswith("sde"):
        raise _refusal(f"{name} with algorithm_type {config['algorithm_type']} {NOISY}")
    _check_steps(steps, int(_value(name, config, "num_train_timesteps")))
    if name in MULTISTEP_SAMPLERS or (_value(name, config, "solver_order") or 1) > 1:
        return read_multistep(config, steps)
    return _sigma_schedule(name, config, steps)


_OFF = {"thresholding": "false", "clip_sample": "false", "use_flow_sigmas": "false", "variance_type": "null"}


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"sampler: model: the model's {why}; leave `sampler` out to invert DDIM, or set scheduler: {{class: "
        "EulerDiscreteScheduler}, or {class: DPMSolverMultistepScheduler}"
    )


def _check_steps(steps: int, train_steps: int) -> None:
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps is {steps}: this model's schedule has between 1 and {train_steps}")


def _value(name: str, config: Mapping[str, Any], key: str) -> Any:
    """A parameter of a scheduler of this class, its default where the configuration is silent, None for one that the
    class does not have."""
    import diffusers

    known = inspect.signature(getattr(diffusers, name)).parameters
    return config.get(key, known[key].default) if key in known else None


def _sigma_schedule(name: str, config: Mapping[str, Any], steps: int) -> Schedule:
    """Euler's steps, or DPM-Solver++'s of order 1, between the noise levels that the sampler visits."""
    import diffusers

    sampler = getattr(diffusers, name).from_config(dict(config))
    sampler.set_timesteps(steps)
    t_S = sampler.timesteps.flip(0)
    if len(t_S) != steps or (steps > 1 and t_S[-1] == t_S[-2]):
        raise ValueError(f"{name} cannot make {steps} steps of these times; take another number of steps or spacing")
    s = sampler.sigmas[: steps + 1].double().flip(0)
    alpha = 1 / (1 + s**2).sqrt()
    sigma = s * alpha
    seed_scale = 1.0
    alpha_prev_S, sigma_prev_S = alpha[:-1].clone(), sigma[:-1].clone()
    if name == "EulerDiscreteScheduler":
        # The pipeline decodes z / alpha, and makes the first latent of z / alpha = seed * init_noise_sigma.
        alpha_prev_S[0], sigma_prev_S[0] = 1.0, s[0]
        seed_scale = float((1 + s[-1] ** 2).sqrt() / float(sampler.init_noise_sigma))
    return first_order(
        sampler.config.prediction_type, t_S, (alpha[1:], sigma[1:]), (alpha_prev_S, sigma_prev_S), seed_scale
    )
