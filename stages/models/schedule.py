"""The noise schedule as numbers: what one deterministic sampling step does, and what its inverse needs.

Every sampler here is affine in the network's output: going down from the noisier latent z to the cleaner z_prev,

    z_prev = scale * z + weight * m(z, t)

with m the network's own output (noise, v, or a flow's velocity). All methods of inversion are written against these two
numbers, so they serve every prediction type and every schedule.

Legend: S steps, index 0 next to the picture, S - 1 at the noise; B rows, each at a step of its own; `z_BCHW` latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from stages.models.settings import FLOW_SCHEDULERS, VP_SCHEDULERS

Level = tuple[torch.Tensor, torch.Tensor]
"""alpha_S and sigma_S."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Step:
    """One step's coefficients for each row, shaped (B, 1, 1, 1) to broadcast over latents; `t_B` and `t_prev_B`, the
    time of z_prev (see `Schedule`), are (B,). `alpha` and `sigma`, z's noise level, are left out where no step stands
    between two levels (`stages.inversion.sweeps`)."""

    t_B: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    back_scale: torch.Tensor
    back_weight: torch.Tensor
    alpha: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    t_prev_B: torch.Tensor | None = None

    def down(self, z_BCHW: torch.Tensor, m_BCHW: torch.Tensor) -> torch.Tensor:
        """The sampling step D_t: from z to z_prev, m evaluated at z."""
        return self.scale * z_BCHW + self.weight * m_BCHW

    def up(self, z_prev_BCHW: torch.Tensor, m_BCHW: torch.Tensor) -> torch.Tensor:
        """The map whose fixed point inverts the step: D_t(z) = z_prev exactly when z = up(z_prev, m(z, t))."""
        return (z_prev_BCHW - self.weight * m_BCHW) / self.scale

    def explicit(self, z_prev_BCHW: torch.Tensor, m_BCHW: torch.Tensor) -> torch.Tensor:
        """DDIM inversion, m evaluated at z_prev: x_0 and noise are read off z_prev at its own noise level."""
        return self.back_scale * z_prev_BCHW + self.back_weight * m_BCHW


@dataclass(frozen=True)
class Schedule:
    """All steps of one sampler.

    Attributes:
        prediction: What the network's output is: "epsilon", "v_prediction", "sample" or "flow".
        t_S: What the network is told as the time.
        scale_S, weight_S: z_prev = scale z + weight m(z, t).
        back_scale_S, back_weight_S: The explicit inverse, z = back_scale z_prev + back_weight m(z_prev, t).
        alpha_S, sigma_S, alpha_prev_S, sigma_prev_S: z at noise level t is alpha x_0 + sigma eps; the same of z_prev.
        seed_scale: The latent that a pipeline is given is this times z at the highest noise level.
        t_prev_S: What the network is told as the time of z_prev; None where that is no time of the network's (z_0 of a
            variance-preserving chain).
    """

    prediction: str
    t_S: torch.Tensor
    scale_S: torch.Tensor
    weight_S: torch.Tensor
    back_scale_S: torch.Tensor
    back_weight_S: torch.Tensor
    alpha_S: torch.Tensor
    sigma_S: torch.Tensor
    alpha_prev_S: torch.Tensor
    sigma_prev_S: torch.Tensor
    seed_scale: float = 1.0
    t_prev_S: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.t_S)

    def to(self, device: torch.device | str) -> Schedule:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in columns.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    @cached_property
    def _table_6S(self) -> torch.Tensor:
        """What a `Step` has of each step beside its times, together: one look-up instead of six."""
        columns = (
            self.scale_S, self.weight_S, self.back_scale_S, self.back_weight_S, self.alpha_S, self.sigma_S,
        )  # fmt: skip
        return torch.stack([column.float() for column in columns])

    def at(self, k_B: torch.Tensor) -> Step:
        """The coefficients of each row's own step; k_B int64, values in [0, S)."""
        found = self._table_6S[:, k_B].view(6, -1, 1, 1, 1).unbind()
        scale, weight, back_scale, back_weight, alpha, sigma = found
        return Step(
            self.t_S[k_B], scale, weight, back_scale, back_weight, alpha, sigma,
            None if self.t_prev_S is None else self.t_prev_S[k_B],
        )  # fmt: skip

    def epsilon(self, k: int, z_BCHW: torch.Tensor, m_BCHW: torch.Tensor) -> torch.Tensor:
        """The noise that the output m at z stands for, at step k."""
        alpha, sigma = float(self.alpha_S[k]), float(self.sigma_S[k])
        if self.prediction == "epsilon":
            return m_BCHW
        if self.prediction == "v_prediction":
            return alpha * m_BCHW + sigma * z_BCHW
        if self.prediction == "sample":
            return (z_BCHW - alpha * m_BCHW) / sigma
        return z_BCHW + alpha * m_BCHW


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """A scheduler's configuration with parameters, and perhaps its class (``class``), replaced.

    Raises:
        ValueError: The scheduler has no such parameter, or is none whose noise levels are understood here.
    """
    import diffusers

    given = dict(changes or {})
    name = given.pop("class", config.get("_class_name"))
    made = {**config, **given, **({} if name is None else {"_class_name": name})}
    check_config(made)
    if given:
        known = inspect.signature(getattr(diffusers, name or "DDIMScheduler")).parameters
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"scheduler: {name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    return made


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler whose configuration says something else than a chain of betas or a flow.

    Raises:
        ValueError: It would be read as a schedule that it is not.
    """
    name = config.get("_class_name")
    if name in FLOW_SCHEDULERS:
        return
    if name is not None and name not in VP_SCHEDULERS:
        raise ValueError(
            f"the model's scheduler is {name}, whose noise levels are not understood here; if it was trained with one "
            f"of {', '.join(VP_SCHEDULERS + FLOW_SCHEDULERS)}, say so with scheduler: {{class: ...}}"
        )
    if config.get("trained_betas") is not None:
        return
    missing = [key for key in ("beta_start", "beta_end", "beta_schedule") if config.get(key) is None]
    if missing:
        raise ValueError(f"the scheduler's configuration has no {missing[0]}: its noise levels cannot be told from it")
    if config["beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(
            f"the scheduler's beta_schedule {config['beta_schedule']!r} is none of {', '.join(BETA_SCHEDULES)}"
        )


def noise_levels(config: Mapping[str, Any]) -> torch.Tensor:
    """abar_T, float64: z at training time t is sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    Raises:
        ValueError: The scheduler is none of a variance-preserving chain.
    """
    import diffusers

    check_config(config)
    name = config.get("_class_name", "DDIMScheduler")
    if name in FLOW_SCHEDULERS:
        raise ValueError(f"the model's scheduler is {name}: a flow has no noise-prediction loss")
    abar_T: torch.Tensor = getattr(diffusers, name).from_config(dict(config)).alphas_cumprod
    return abar_T.double()


def ddim_schedule(config: Mapping[str, Any], steps: int) -> Schedule:
    """DDIM as diffusers' `DDIMScheduler` runs it, without clipping.

    Args:
        config: The configuration of any diffusers scheduler of a variance-preserving model (DDIM, PNDM, Euler, DPM,
            ...).
        steps: Sampling steps S.

    Raises:
        ValueError: Noise levels, a prediction type or a number of steps that cannot be run.
    """
    from diffusers import DDIMScheduler

    check_config(config)
    scheduler = DDIMScheduler.from_config({**config, "clip_sample": False, "thresholding": False})
    train_steps = scheduler.config.num_train_timesteps
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps is {steps}: this model's schedule has between 1 and {train_steps}")
    scheduler.set_timesteps(steps)
    t_S = scheduler.timesteps.flip(0)
    if len(t_S) != steps:
        raise ValueError(
            f"steps is {steps}: rounding makes DDIM's timestep_spacing {scheduler.config.timestep_spacing} visit "
            f"{len(t_S)} times, one of them negative; take {steps - 1} or {steps + 1}"
        )
    if int(t_S[-1]) >= train_steps:
        raise ValueError(f"steps is {steps}: with this steps_offset the last time is beyond {train_steps - 1}")
    # The sampler's previous time is t - T // S, also where rounding makes the next entry of `timesteps` another one.
    prev_S = t_S - train_steps // steps
    _check_chain(t_S, prev_S, scheduler.config.timestep_spacing)
    abar_S = scheduler.alphas_cumprod.double()[t_S]
    abar_prev_S = torch.where(
        prev_S >= 0, scheduler.alphas_cumprod.double()[prev_S.clamp(min=0)], scheduler.final_alpha_cumprod.double()
    )
    return first_order(
        scheduler.config.prediction_type, t_S, (abar_S.sqrt(), (1 - abar_S).sqrt()),
        (abar_prev_S.sqrt(), (1 - abar_prev_S).sqrt()),
    )  # fmt: skip


def first_order(
    prediction: str, t_S: torch.Tensor, level: Level, level_prev: Level, seed_scale: float = 1.0
) -> Schedule:
    """DDIM's steps (Song et al., 2021, equation 12, eta = 0) between given noise levels.

    phi_t = alpha_prev / alpha and psi_t = sigma_prev - alpha_prev sigma / alpha are `scale` and `weight` of an epsilon
    model. A v model's step is the rotation z_prev = cos(d) z - sin(d) v by the angle d between the two noise levels,
    which stays finite at zero signal.

    Args:
        level: alpha_S and sigma_S, whose squares sum to one.
        level_prev: Those of z_prev.
        seed_scale: See `Schedule`.

    Raises:
        ValueError: A prediction type that is not known, or a step without an inverse.
    """
    (alpha_S, sigma_S), (alpha_prev_S, sigma_prev_S), steps = level, level_prev, len(t_S)
    if prediction == "epsilon":
        scale_S, weight_S = alpha_prev_S / alpha_S, sigma_prev_S - alpha_prev_S * sigma_S / alpha_S
        back_scale_S, back_weight_S = 1 / scale_S, -weight_S / scale_S
    elif prediction == "v_prediction":
        scale_S = alpha_prev_S * alpha_S + sigma_prev_S * sigma_S
        weight_S = sigma_prev_S * alpha_S - alpha_prev_S * sigma_S
        back_scale_S, back_weight_S = scale_S, -weight_S
    elif prediction == "sample":
        scale_S, weight_S = sigma_prev_S / sigma_S, alpha_prev_S - alpha_S * sigma_prev_S / sigma_S
        back_scale_S, back_weight_S = sigma_S / sigma_prev_S, alpha_S - alpha_prev_S * sigma_S / sigma_prev_S
    else:
        raise ValueError(f"prediction_type {prediction!r} is not one of epsilon, v_prediction, sample")
    finite = bool(torch.stack([scale_S, weight_S, back_scale_S, back_weight_S]).isfinite().all())
    if not finite or bool((scale_S == 0).any()):
        raise ValueError(
            f"the schedule of {steps} steps reaches zero signal or zero noise, where a {prediction} model's step keeps "
            "nothing of the latent it starts from and has no inverse: take more steps, or set scheduler: "
            "{timestep_spacing: leading, rescale_betas_zero_snr: false, set_alpha_to_one: false}"
        )
    return Schedule(
        prediction, t_S, scale_S, weight_S, back_scale_S, back_weight_S, alpha_S, sigma_S, alpha_prev_S, sigma_prev_S,
        seed_scale,
    )  # fmt: skip


def _check_chain(t_S: torch.Tensor, prev_S: torch.Tensor, spacing: str) -> None:
    """Refuse steps that do not end where the next one starts: there the network is told another time than the latent
    has. ``trailing`` rounds its times, which may leave one training time between two steps and no more.

    Raises:
        ValueError: There are larger gaps.
    """
    gap_S, step = (prev_S[1:] - t_S[:-1]).abs(), int(t_S[0] - prev_S[0])
    rounding = 1 if spacing == "trailing" and step >= 10 else 0
    if bool((gap_S > rounding).any()):
        raise ValueError(
            f"DDIM at timestep_spacing {spacing} and {len(t_S)} steps of {step} training times leaves gaps of up to "
            f"{int(gap_S.max())} between them: set scheduler: {{timestep_spacing: leading}}, or trailing with steps "
            "that divide the training times"
        )
