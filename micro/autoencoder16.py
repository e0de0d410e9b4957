"""The autoencoder of the flow models: 16 latent channels, for the world and for photographs.

Diffusers' `AutoencoderKL` as FLUX.1 and Stable Diffusion 3 use it: no quantisation convolutions, a shift and a scaling
factor that bring latents to mean 0 and variance 1. What makes minutes on one core go far:

- the encoder first learns, apart, the 16 whitened principal components of 8x8 patches (28.1 dB on held-out photographs
  by themselves): from its first step on the decoder reads latents that say something;
- windows of 32x32 pixels first, whole pictures last (`micro.autoencoder`);
- few channels where there are many pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from micro import autoencoder, data, photographs, world
from micro.training import Recipe, pick_device, pictures_to_tensor, train

CHANNELS = 16
_WIDTHS = (16, 32, 64, 128)
_PATCH = 8
_WINDOW = 32
_KL = 3e-8
"""Of the posterior's divergence summed over a latent: noise of about a tenth of a standard deviation."""


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=CHANNELS, block_out_channels=_WIDTHS, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=16, sample_size=world.SIZE, mid_block_add_attention=True, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """What it learns from: the world's pictures with their labels, crops of photographs, and of drawings."""

    world: np.ndarray
    labels: np.ndarray
    photographs: np.ndarray
    drawings: np.ndarray

    @staticmethod
    def load(work: Path, folder: Path) -> Pictures:
        """``folder`` holds the unpacked packages that `micro.photographs` names."""
        return Pictures(
            data.split_pictures(work, "train", world.TRAIN_SIZE),
            np.asarray(data.split_labels(work, "train", world.TRAIN_SIZE)),
            photographs.split(work, folder, "photograph", heldout=False, each=240),
            photographs.split(work, folder, "drawing", heldout=False, each=3, most=2500),
        )

    def batch(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, 64, 64, 3): two of five of the world, two photographs, one drawing."""
        drawn, seen = count // 5, 2 * count // 5
        parts = [(self.world, count - drawn - seen), (self.photographs, seen), (self.drawings, drawn)]
        return photographs.mixed(parts, rng)

    def windows(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, 32, 32, 3): half around objects of the world, the others anywhere in photographs and drawings."""
        rows = rng.integers(len(self.world), size=count // 2)
        around = autoencoder.crops_around(self.world, self.labels, rows, rng)
        drawn = count // 8
        whole = photographs.mixed([(self.photographs, count - len(rows) - drawn), (self.drawings, drawn)], rng)
        corners = rng.integers(world.SIZE - _WINDOW + 1, size=(len(whole), 2))
        cut = [p[y : y + _WINDOW, x : x + _WINDOW] for p, (y, x) in zip(whole, corners, strict=True)]
        return np.concatenate([around, np.stack(cut)])


def principal(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (192,), the 16 leading axes (192, 16) and their standard deviations (16,) of 8x8 patches in [-1, 1]."""
    x = patches(pictures)
    values, axes = np.linalg.eigh(np.cov(x.astype(np.float64), rowvar=False))
    order = np.argsort(-values)[:CHANNELS]
    return x.mean(0), axes[:, order], np.sqrt(values[order])


def patches(pictures: np.ndarray) -> np.ndarray:
    """(n, H, W, 3) uint8 -> (n * H/8 * W/8, 192) float32 in [-1, 1]."""
    n, h, w, _ = pictures.shape
    x = (pictures.astype(np.float32) / 127.5 - 1).reshape(n, h // _PATCH, _PATCH, w // _PATCH, _PATCH, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, _PATCH * _PATCH * 3)


class _Autoencoding(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def loss(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(x_BCHW).latent_dist
        error = self.vae.decode(posterior.sample()).sample - x_BCHW
        return error.square().mean() + 0.05 * error.abs().mean() + _KL * posterior.kl().mean()


class _Coding(nn.Module):
    """The encoder alone, taught the whitened principal components."""

    def __init__(self, encoder: nn.Module, sample: np.ndarray) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean, axes, std = principal(sample)
        self.whiten = (axes / std).astype(np.float32)

    def loss(self, pictures: np.ndarray, device: torch.device) -> torch.Tensor:
        h, w = (edge // _PATCH for edge in pictures.shape[1:3])
        code = ((patches(pictures) - self.mean) @ self.whiten).reshape(len(pictures), h, w, CHANNELS)
        wanted = torch.from_numpy(code).to(device).permute(0, 3, 1, 2)
        said, spread = self.encoder(pictures_to_tensor(pictures, device)).chunk(2, 1)
        return (said - wanted).square().mean() + 0.01 * (spread + 4).square().mean()  # a posterior of std exp(-2)


def train_autoencoder(work: Path, pictures: Pictures, coding: Recipe, windows: Recipe, whole: Recipe) -> AutoencoderKL:
    """Encoder, then both on windows, then on whole pictures; shift and scaling factor set on world and photographs."""
    device = pick_device()
    torch.manual_seed(7)
    model = _Autoencoding(build()).to(device)
    model.vae.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(7)

    coder = _Coding(model.vae.encoder, pictures.batch(2000, rng))
    taught = train("autoencoder16-code", coder, lambda rows, rng: coder.loss(pictures.windows(len(rows), rng), device),
                   1, coding.on(device), work, seed=7)  # fmt: skip
    model.vae.encoder.load_state_dict(taught.encoder.state_dict())

    def loss_of_windows(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return model.loss(pictures_to_tensor(pictures.windows(len(rows), rng), device))

    def loss_of_whole(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return model.loss(pictures_to_tensor(pictures.batch(len(rows), rng), device))

    averaged = train("autoencoder16-windows", model, loss_of_windows, 1, windows.on(device), work, seed=8)
    if not (work / "autoencoder16.pt").exists():
        model.load_state_dict(averaged.state_dict())
        balance(model.vae, pictures.batch(1000, rng))
    vae = train("autoencoder16", model, loss_of_whole, 1, whole.on(device), work, seed=9).vae
    normalise(vae, pictures.batch(2000, rng))
    return vae


@torch.no_grad()
def balance(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Bring the channels' standard deviations halfway (as square roots) to one: scale the convolutions at both ends.

    Nothing that is computed changes. Left alone, the channels of a patch's mean colour grow to six times the others.
    """
    factor = autoencoder.encode_all(vae, pictures).std((0, 2, 3)).sqrt().to(vae.device)
    out, back = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:CHANNELS] /= factor[:, None, None, None]
    out.bias[:CHANNELS] /= factor
    out.bias[CHANNELS:] -= 2 * factor.log()
    back.weight *= factor[None, :, None, None]


def normalise(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Set the shift and the scaling factor with which these pictures' latents have mean 0 and variance 1."""
    z = autoencoder.encode_all(vae, pictures)
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))


def encode_scaled(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """(n, 16, h, w) float32 on the CPU: the latents that the flow models draw."""
    return (autoencoder.encode_all(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
