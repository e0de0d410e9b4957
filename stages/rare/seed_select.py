"""Noise optimised through the sampler, so that what comes out looks like a concept's pictures.

"Generating images of rare concepts using pre-trained diffusion models" (SeedSelect; Samuel et al., AAAI 2024), with the
loss, weights and rates of the authors' code. Gradients run through every denoising step; each step, and each picture
made on the way, is computed again on the way back, so that memory holds one pass and not all of them.

Legend: B rows; `z_BCHW` latents, the noise z_T where nothing else is said; `x_BCHW` pictures in [-1, 1]; E embedding
width; S sampling steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.engine.adamw import RowAdamW
from stages.engine.gradients import RowGradient
from stages.engine.slots import per_row
from stages.models.latent import Condition, Predict
from stages.models.multistep import Multistep
from stages.models.sampler import denoise
from stages.models.schedule import Schedule

if TYPE_CHECKING:
    from stages.models.clip import ImageEncoder

TAIL = (0.7, 0.25, 0.05)
"""Weights of the last steps' pictures, the very last first [read]."""
SEMANTIC = 10.0
"""Weight of the CLIP distance beside the latents' squared one [read]."""
FAST = 3
"""Updates at the full rate; the rest make a tenth of it [read]."""


@dataclass(frozen=True)
class Target:
    """What the pictures should look like.

    Attributes:
        centroid_BE: Unit vectors: the mean direction of the references' image embeddings.
        latent_BCHW: The mean of the references' latents.
    """

    centroid_BE: torch.Tensor
    latent_BCHW: torch.Tensor


@dataclass(frozen=True)
class Selected:
    """Optimised noise, and the loss of each at its start and before its last update."""

    z_BCHW: torch.Tensor
    start_B: torch.Tensor
    loss_B: torch.Tensor


def centroid(embeddings_KE: torch.Tensor) -> torch.Tensor:
    """Unit vector (E,) along the mean of the embeddings' directions."""
    return nn.functional.normalize(nn.functional.normalize(embeddings_KE, dim=1).mean(0), dim=0)


def clip_pixels(x_BCHW: torch.Tensor, encoder: ImageEncoder) -> torch.Tensor:
    """Pictures in [-1, 1] as the encoder's processor would hand them to it, with gradients: clipped, resized
    (antialiased bicubic) to the encoder's size, normalised. Pictures are square."""
    size = encoder.model.config.image_size
    x_BCHW = (x_BCHW / 2 + 0.5).clamp(0, 1)
    if x_BCHW.shape[-1] != size:
        x_BCHW = nn.functional.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (
        torch.tensor(values, device=x_BCHW.device).view(1, -1, 1, 1)
        for values in (encoder.processor.image_mean, encoder.processor.image_std)
    )
    return (x_BCHW - mean) / std


def last_latents(
    predict: Predict, schedule: Schedule | Multistep, z_BCHW: torch.Tensor, condition: Condition, count: int
) -> list[torch.Tensor]:
    """The latents after each of the last `count` steps of DDIM sampling, z_0 first; differentiable in the noise."""
    return [*deque(denoise(predict, schedule, z_BCHW, condition, recompute=True), maxlen=count)][::-1]


def select_loss(
    latents: list[torch.Tensor], target: Target, embed: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """loss_B: ``10 sum_k w_k (1 - cos(picture_k, centroid)) + mean squared distance of z_0 to the mean latent``.

    Args:
        latents: After the last steps, z_0 first; as many as there are weights.
        embed: Latents to image embeddings, differentiable.
    """
    distance_B = torch.zeros(len(latents[0]), device=latents[0].device)
    for weight, z_BCHW in zip(TAIL, latents, strict=True):
        # Computed again on the way back: memory holds one picture's activations instead of three.
        z_BE = checkpoint(embed, z_BCHW, use_reentrant=False)
        cosine_B = nn.functional.cosine_similarity(z_BE, target.centroid_BE, dim=1)
        distance_B = distance_B + weight * (1 - cosine_B)
    return SEMANTIC * distance_B + (latents[0] - target.latent_BCHW).square().flatten(1).mean(1)


def optimise_noise(
    z_BCHW: torch.Tensor, condition: Condition, target: Target, *, predict: Predict, schedule: Schedule | Multistep,
    embed: Callable[[torch.Tensor], torch.Tensor], iterations: int, rate: float, scale: float | None = None,
) -> Selected:  # fmt: skip
    """AdamW on the noise; every row has its own loss, so rows do not see each other.

    Args:
        schedule: At least three steps.
        embed: Latents to image embeddings, differentiable.
        iterations, rate: Updates; the rate falls to a tenth after three of them.
        scale: `RowGradient`'s. With five updates none is to be lost: a gradient that overflows is taken again under
            half the scale. A row without a finite one becomes NaN.
    """
    noise_BCHW = z_BCHW.detach().clone()

    def slowed(steps_B: torch.Tensor) -> torch.Tensor:
        full, slow = (torch.full_like(steps_B, value, dtype=torch.float64) for value in (rate, rate / 10))
        return torch.where(steps_B < FAST, full, slow)

    adam = RowAdamW(noise_BCHW, slowed)
    gradient = RowGradient(len(noise_BCHW), scale, noise_BCHW.device)
    start_B = loss_B = torch.zeros(len(noise_BCHW))
    for update in range(iterations):
        repeat = True
        while repeat:
            variable = noise_BCHW.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                latents = last_latents(predict, schedule, variable, condition, len(TAIL))
                each_B = select_loss(latents, target, embed)
                slope_BCHW, skip_B = gradient(each_B, variable)
            repeat = bool((skip_B & each_B.isfinite() & (gradient.scale_B >= 1)).any())
        adam.step(slope_BCHW)
        noise_BCHW.masked_fill_(per_row(skip_B, noise_BCHW), torch.nan)
        loss_B = each_B.detach().cpu()
        start_B = loss_B if update == 0 else start_B
    return Selected(noise_BCHW, start_B, loss_B)


def embedder(decode: Callable[[torch.Tensor], torch.Tensor], encoder: ImageEncoder) -> Callable[..., Any]:
    """Latents to image embeddings through decoder and encoder, with gradients."""

    def embed(z_BCHW: torch.Tensor) -> torch.Tensor:
        return encoder.embed(clip_pixels(decode(z_BCHW), encoder)).float()

    return embed
