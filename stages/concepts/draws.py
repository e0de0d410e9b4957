"""The random numbers of a learning step: which pictures, how noisy, and the noise.

Legend: K pictures a concept and step, I training pictures; C H W latents.

What was added later has random numbers of its own, so that the others stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stages.concepts.settings import LegoSettings
from stages.concepts.templates import texts
from stages.engine.randomness import row_generator


@dataclass(frozen=True)
class Draw:
    """What one step of one concept sees.

    Attributes:
        picture_K: Numbers of training pictures.
        t_K: Timesteps.
        noise_KCHW: The noise that is added.
        template_K: Which of the texts each prompt stands in; 0 where there are none.
        flip_K: 1: the picture is mirrored.
        posterior_KCHW: Standard normal numbers that place latents in the autoencoder's posterior; None: its mean.
    """

    picture_K: torch.Tensor
    t_K: torch.Tensor
    noise_KCHW: torch.Tensor
    template_K: torch.Tensor
    flip_K: torch.Tensor
    posterior_KCHW: torch.Tensor | None


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
        settings: `pictures`, `separation`, `skew`, `templates`, `flip` and `posterior` count.
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
    K, shape = settings.pictures, (settings.pictures, *latent_shape)
    level_K = skewed(torch.rand(K, generator=generator, dtype=torch.float64), settings.skew)
    noise_KCHW = torch.randn(shape, generator=generator)
    own = partial(row_generator, seed, row_id)
    prompts = texts(settings.templates)
    return Draw(
        picture_K=torch.cat(chosen),
        t_K=(level_K * timesteps).long().clamp(max=timesteps - 1),
        noise_KCHW=noise_KCHW,
        template_K=_index(1 if prompts is None else len(prompts), K, partial(own, f"lego templates {step}")),
        flip_K=_index(2 if settings.flip else 1, K, partial(own, f"lego flips {step}")),
        posterior_KCHW=(
            torch.randn(shape, generator=own(f"lego posterior {step}")) if settings.posterior == "sample" else None
        ),
    )


def _index(choices: int, count: int, generator: Callable[[], torch.Generator]) -> torch.Tensor:
    """`count` numbers below `choices`, each as likely as any other; nothing is drawn where there is no choice."""
    if choices == 1:
        return torch.zeros(count, dtype=torch.long)
    return torch.randint(choices, (count,), generator=generator())


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
