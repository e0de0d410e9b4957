"""The random numbers of a learning step: which pictures, how noisy, and the noise.

Legend: K pictures a concept and step, I training pictures; C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.concepts.settings import LegoSettings
from stages.engine.randomness import row_generator


@dataclass(frozen=True)
class Draw:
    """What one step of one concept sees: numbers of training pictures, timesteps and noise."""

    picture_K: torch.Tensor
    t_K: torch.Tensor
    noise_KCHW: torch.Tensor


def draw(
    settings: LegoSettings,
    seed: int,
    row_id: str,
    step: int,
    with_I: torch.Tensor,
    latent_shape: Sequence[int],
    timesteps: int,
) -> Draw:
    """The random numbers of one step: a function of (job seed, row id, step) alone, so any step can be replayed.

    Half of the pictures show the concept and half do not; without subject separation all of them show it.

    Args:
        settings: `pictures`, `separation` and `skew` count.
        seed: The job's seed.
        row_id: The concept's row.
        step: Number of the step.
        with_I: Which training pictures show the concept.
        latent_shape: (C, H, W).
        timesteps: Of the noise schedule; those drawn lie in [0, timesteps).
    """
    generator = row_generator(seed, row_id, f"lego {step}")
    sets = [with_I.nonzero().flatten(), (~with_I).nonzero().flatten()]
    shares = [settings.pictures // 2] * 2 if settings.separation else [settings.pictures, 0]
    chosen = [_choose(of_set, count, generator) for of_set, count in zip(sets, shares, strict=True) if count]
    level_K = skewed(torch.rand(settings.pictures, generator=generator, dtype=torch.float64), settings.skew)
    return Draw(
        torch.cat(chosen),
        (level_K * timesteps).long().clamp(max=timesteps - 1),
        torch.randn((settings.pictures, *latent_shape), generator=generator),
    )


def _choose(pool: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` members of the pool, each as often as any other give or take one."""
    rounds = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(math.ceil(count / len(pool)))]
    return torch.cat(rounds)[:count]


def skewed(u_K: torch.Tensor, skew: float) -> torch.Tensor:
    """Uniform numbers -> density 1 - skew cos(pi x) on [0, 1], by bisection (ReVersion's importance sampling)."""
    if not skew:
        return u_K
    low, high = torch.zeros_like(u_K), torch.ones_like(u_K)
    for _ in range(40):
        middle = (low + high) / 2
        below = middle - skew * torch.sin(math.pi * middle) / math.pi < u_K
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
