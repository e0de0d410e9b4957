"""Between pictures and a denoiser's latents: a frozen autoencoder, and what it says of scale, shift and squares.

An autoencoder of pictures with alpha is shown opaque ones, and what it makes is laid over white, as pictures with alpha
are that jobs read (`pipeline.pictures`).

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents as the denoiser sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def encode(vae: Any, x_BCHW: torch.Tensor) -> torch.Tensor:
    """z_BCHW, float32: the posterior's mean, as the denoiser sees it."""
    return posterior(vae, x_BCHW)[0]


def posterior(vae: Any, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z_BCHW and std_BCHW, float32: mean and standard deviation of the posterior, as the denoiser sees them."""
    x = x_BCHW.to(vae.device, vae.dtype)
    if vae.config.get("in_channels") == 4:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    found = vae.encode(x[:, :, None] if is_video(vae.config) else x).latent_dist
    mean, std = (part[:, :, 0] if is_video(vae.config) else part for part in (found.mean.float(), found.std.float()))
    return to_latent(mean, vae), spread_of_latent(std, vae)


def decode(vae: Any, z_BCHW: torch.Tensor) -> torch.Tensor:
    """x_BCHW (about [-1, 1], not clamped), float32; differentiable."""
    mean_BCHW = from_latent(z_BCHW.float(), vae).to(vae.dtype)
    if is_video(vae.config):
        return on_white(vae.decode(mean_BCHW[:, :, None]).sample[:, :, 0].float())
    return on_white(vae.decode(mean_BCHW).sample.float())


def on_white(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] with an alpha as their fourth channel, from -1 (not there) to 1, over white."""
    if x_BCHW.shape[1] != 4:
        return x_BCHW
    seen_B1HW = (x_BCHW[:, 3:] + 1) / 2
    return seen_B1HW * x_BCHW[:, :3] + (1 - seen_B1HW)


def is_video(config: Mapping[str, Any]) -> bool:
    """Autoencoders of videos take a picture as one frame, (B, C, 1, H, W); they say how they shorten time."""
    return "temperal_downsample" in config  # as diffusers spells it


def to_latent(mean_BCHW: torch.Tensor, vae: Any) -> torch.Tensor:
    """Scaled and shifted: ((mean - latents_mean) / latents_std - shift_factor) scaling_factor, of which a configuration
    has what it has; FLUX.2's instead in squares, less their running mean, by their running deviation."""
    config: Mapping[str, Any] = vae.config
    if in_squares(config):
        squares = to_squares(mean_BCHW)
        return (squares - _mean(vae)) / _deviation(vae)
    if standardised(config):
        mean_BCHW = (mean_BCHW - _channels(config["latents_mean"], mean_BCHW)) / _channels(
            config["latents_std"], mean_BCHW
        )
    if config.get("shift_factor") is not None:
        mean_BCHW = mean_BCHW - config["shift_factor"]
    return mean_BCHW * config.get("scaling_factor", 1.0)


def spread_of_latent(std_BCHW: torch.Tensor, vae: Any) -> torch.Tensor:
    """Of a posterior's standard deviation, as `to_latent` has its mean."""
    config: Mapping[str, Any] = vae.config
    if in_squares(config):
        return to_squares(std_BCHW) / _deviation(vae)
    if standardised(config):
        std_BCHW = std_BCHW / _channels(config["latents_std"], std_BCHW)
    return std_BCHW * config.get("scaling_factor", 1.0)


def from_latent(z_BCHW: torch.Tensor, vae: Any) -> torch.Tensor:
    """The inverse of `to_latent`."""
    config: Mapping[str, Any] = vae.config
    if in_squares(config):
        return from_squares(z_BCHW * _deviation(vae) + _mean(vae))
    mean_BCHW = z_BCHW / config.get("scaling_factor", 1.0)
    if config.get("shift_factor") is not None:
        mean_BCHW = mean_BCHW + config["shift_factor"]
    if standardised(config):
        mean_BCHW = mean_BCHW * _channels(config["latents_std"], z_BCHW) + _channels(config["latents_mean"], z_BCHW)
    return mean_BCHW


def standardised(config: Mapping[str, Any]) -> bool:
    """Whether each channel has a mean and a spread of its own."""
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def in_squares(config: Mapping[str, Any]) -> bool:
    """FLUX.2's autoencoder hands each 2 x 2 square of latents on as one of four times the channels, which a batch norm
    at rest standardises."""
    return "batch_norm_eps" in config


def to_squares(z_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, 4 C, H / 2, W / 2)."""
    return torch.nn.functional.pixel_unshuffle(z_BCHW, 2)


def from_squares(z_BCHW: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_squares`."""
    return torch.nn.functional.pixel_shuffle(z_BCHW, 2)


def _mean(vae: Any) -> torch.Tensor:
    mean_C: torch.Tensor = vae.bn.running_mean
    return mean_C.float().view(1, -1, 1, 1)


def _deviation(vae: Any) -> torch.Tensor:
    variance_C: torch.Tensor = vae.bn.running_var
    return (variance_C.float() + vae.config["batch_norm_eps"]).sqrt().view(1, -1, 1, 1)


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, 1, 1)
