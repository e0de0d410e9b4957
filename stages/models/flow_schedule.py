"""Euler steps of a rectified flow, z = (1 - sigma) x_0 + sigma eps, at the noise levels that a pipeline visits.

z_prev = z + (sigma_prev - sigma) v(z, t): `scale` is 1, and every method of inversion applies unchanged. Which sigmas
are visited is not the scheduler's business alone: pipelines hand it a grid of their own, and a shift mu that they work
out of the picture's size.

Legend: S steps, index 0 next to the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from stages.models.schedule import Schedule


@dataclass(frozen=True)
class FlowGrid:
    """How a family's pipeline sets its scheduler.

    Attributes:
        linear: It hands over sigmas from 1 to 1 / S in equal steps, computed in this type; None: the scheduler's own
            are taken.
        patch: Side of the patch of latents that is one token: mu depends on the number of tokens.
        listed: Sigmas that it hands over in their place, as many as there are steps: a model's own, from its index.
        shift: How: along the line that the scheduler's configuration gives, or along FLUX.2's, which also depends on
            the number of steps.
    """

    linear: Literal["float64", "float32"] | None
    patch: int = 2
    shift: Literal["configured", "empirical"] = "configured"
    listed: tuple[float, ...] | None = None


def check_flow(config: Mapping[str, Any]) -> None:
    """Refuse settings of a flow's scheduler under which no latent regenerates a picture, or time runs backwards.

    Raises:
        ValueError: There is one.
    """
    for key, why in (("stochastic_sampling", "adds fresh noise at each step"), ("invert_sigmas", "runs backwards")):
        if config.get(key):
            raise ValueError(f"scheduler: with {key} the sampler {why}; set scheduler: {{{key}: false}}")


def flow_schedule(
    config: Mapping[str, Any], steps: int, grid: FlowGrid | None = None, latent_shape: tuple[int, int, int] = (0, 0, 0)
) -> Schedule:
    """The steps of `FlowMatchEulerDiscreteScheduler`, set as the pipeline sets it.

    Args:
        config: The scheduler's configuration.
        steps: S.
        grid: The pipeline's; None: the scheduler alone.
        latent_shape: (C, H, W) of the latents, for the shift.

    Raises:
        ValueError: A setting or number of steps without an inverse, or a shift that needs a pipeline to tell it.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_flow(config)
    if grid is None and config.get("use_dynamic_shifting"):
        raise ValueError("a flow schedule with use_dynamic_shifting depends on the picture's size: set a fixed shift")
    if config.get("shift_terminal") is not None and not 0 <= config["shift_terminal"] < 1:
        raise ValueError(f"scheduler: shift_terminal is {config['shift_terminal']}: it is from 0 to below 1")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    train_steps = int(scheduler.config.num_train_timesteps)
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps is {steps}: this model's schedule has between 1 and {train_steps}")
    if grid is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(steps, **_told(scheduler.config, steps, grid, latent_shape))
    sigma = scheduler.sigmas.double().flip(0)
    if not bool(sigma.isfinite().all()):
        raise ValueError(f"steps is {steps}: with its shift_terminal this model's schedule needs 2 or more")
    sigma_prev_S, sigma_S = sigma[:-1], sigma[1:]
    if not bool((sigma_S > sigma_prev_S).all()):
        raise ValueError(
            f"steps is {steps}: two of this schedule's noise levels are the same, and nothing lies between them; take "
            "another number of steps"
        )
    weight_S, one_S = sigma_prev_S - sigma_S, torch.ones_like(sigma_S)
    t_S = scheduler.timesteps.flip(0)
    return Schedule(
        "flow", t_S, one_S, weight_S, one_S, -weight_S, 1 - sigma_S, sigma_S, 1 - sigma_prev_S, sigma_prev_S,
        t_prev_S=torch.cat([t_S.new_zeros(1), t_S[:-1]]),
    )  # fmt: skip


def _told(config: Mapping[str, Any], steps: int, grid: FlowGrid, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the pipeline hands to `set_timesteps` beside the number of steps."""
    told: dict[str, Any] = {}
    if grid.listed is not None:
        if steps != len(grid.listed):
            raise ValueError(
                f"steps is {steps}: this model's pipeline visits sigmas of its own (`sample_sigmas`), and draws in "
                f"{len(grid.listed)} steps whatever it is told; set steps: {len(grid.listed)}"
            )
        told["sigmas"] = list(grid.listed)
    elif grid.linear == "float64":
        told["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    elif grid.linear == "float32":
        told["sigmas"] = torch.linspace(1.0, 1 / steps, steps).tolist()
    if config["use_dynamic_shifting"]:
        tokens = (latent_shape[1] // grid.patch) * (latent_shape[2] // grid.patch)
        if grid.shift == "empirical":
            from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

            told["mu"] = compute_empirical_mu(tokens, steps)
        else:
            told["mu"] = _linear_shift(tokens, config)
    return told


def _linear_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """mu on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), as `calculate_shift`
    of diffusers' pipeline_flux.py has it, in its order of operations; importing that brings all networks along."""
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (many - few)
    return float(tokens * slope + (config["base_shift"] - slope * few))
