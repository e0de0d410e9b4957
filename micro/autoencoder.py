"""The picture autoencoders: Stable Diffusion's AutoencoderKL, and Kandinsky's MOVQ grown out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from micro import data
from micro.training import Recipe, pick_device, pictures_to_tensor, train

CHANNELS = 12
"""Latent channels; pictures of 64x64 become latents of 8x8."""
_WIDTHS = (32, 32, 64, 64)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=CHANNELS, block_out_channels=_WIDTHS, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32, sample_size=64, mid_block_add_attention=True,
    )  # fmt: skip


def build_movq() -> VQModel:
    return VQModel(
        in_channels=3, out_channels=3, latent_channels=CHANNELS, block_out_channels=_WIDTHS, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32, sample_size=64, num_vq_embeddings=2048, vq_embed_dim=CHANNELS, norm_type="spatial",
        mid_block_add_attention=True,
    )  # fmt: skip


class _Reconstruction(nn.Module):
    def __init__(self, vae: AutoencoderKL, kl: float) -> None:
        super().__init__()
        self.vae, self.kl = vae, kl

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(x_BCHW).latent_dist
        out = self.vae.decode(posterior.sample()).sample
        return (out - x_BCHW).square().mean() + 0.1 * (out - x_BCHW).abs().mean() + self.kl * posterior.kl().mean()


def crops_around(pictures: np.ndarray, labels: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """32x32 windows around an object of each picture: background teaches little and costs as much."""
    out = np.empty((len(rows), 32, 32, 3), np.uint8)
    for i, row in enumerate(rows):
        thing = labels[row, rng.integers((labels[row, :, 0] >= 0).sum())]
        x, y = np.clip(thing[4:6] - 16 + rng.uniform(-10, 10, 2), 0, 32).astype(int)
        out[i] = pictures[row, y : y + 32, x : x + 32]
    return out


def train_vae(work: Path, crops: Recipe, whole: Recipe) -> AutoencoderKL:
    """First on windows, then on whole pictures; squared and absolute error plus a light KL term.

    Sets the scaling factor that makes latents unit-variance.
    """
    device = pick_device()
    pictures = data.split_pictures(work, "train", data.world.TRAIN_SIZE)
    labels = np.asarray(data.split_labels(work, "train", data.world.TRAIN_SIZE))
    torch.manual_seed(0)
    model = _Reconstruction(build_vae(), kl=2e-7).to(device)
    model.vae.to(memory_format=torch.channels_last)

    def loss_of_crops(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return model(pictures_to_tensor(crops_around(pictures, labels, rows, rng), device))

    def loss_of_whole(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return model(pictures_to_tensor(pictures[np.sort(rows)], device))

    averaged = train("vae-crops", model, loss_of_crops, len(pictures), crops, work)
    model.load_state_dict(averaged.state_dict())
    vae = train("vae", model, loss_of_whole, len(pictures), whole, work).vae
    z = encode_all(vae, pictures[:2000])
    vae.register_to_config(scaling_factor=float(1 / z.std()))
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL | VQModel, pictures: np.ndarray, batch: int = 100) -> torch.Tensor:
    """Latents (n, C, 8, 8) float32 on the CPU, unscaled: posterior means, or MOVQ's unquantised code."""
    device = next(vae.parameters()).device
    out = []
    for i in range(0, len(pictures), batch):
        encoded = vae.encode(pictures_to_tensor(pictures[i : i + batch], device))
        out.append((encoded.latents if isinstance(vae, VQModel) else encoded.latent_dist.mean).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def psnr_of(vae: AutoencoderKL | VQModel, pictures: np.ndarray) -> float:
    """Mean over pictures of the PSNR in dB of 8-bit pictures after encoding and decoding."""
    device = next(vae.parameters()).device
    values = []
    for i in range(0, len(pictures), 100):
        z = encode_all(vae, pictures[i : i + 100]).to(device)
        out = vae.decode(z, force_not_quantize=True) if isinstance(vae, VQModel) else vae.decode(z)
        drawn = ((out.sample.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().numpy()
        error = np.square(drawn - pictures[i : i + 100].astype(np.float64)).mean((1, 2, 3))
        values.append(10 * np.log10(255**2 / error))
    return float(np.concatenate(values).mean())


def grow_movq(vae: AutoencoderKL) -> VQModel:
    """A MOVQ that computes what the VAE computes: its weights, and spatial norms that start as plain group norms.

    Kandinsky uses MOVQ latents unscaled, so the VAE's scaling factor is folded into the two 1x1 convolutions: the two
    autoencoders then share one latent space.
    """
    movq, scale = build_movq(), vae.config.scaling_factor
    source = vae.state_dict()
    state = movq.state_dict()
    half = vae.config.latent_channels
    for name in state:
        plain = name.replace("spatial_norm.norm_layer", "group_norm").replace(".norm_layer", "")
        if name.startswith("quantize."):
            continue
        if ".conv_y." in name:
            state[name] = torch.ones_like(state[name]) if name.endswith("bias") else torch.zeros_like(state[name])
        elif ".conv_b." in name:
            state[name] = torch.zeros_like(state[name])
        elif name.startswith("quant_conv"):  # the posterior mean: fold the VAE's last two linear maps into one
            continue
        elif name.startswith("encoder.conv_out"):
            state[name] = source[name][:half]
        else:
            state[name] = source[plain]
    # mean = Q[:half] @ conv_out(h) + q; MOVQ's own conv_out has only `half` channels, so fold Q into it
    mix = source["quant_conv.weight"][:half, :, 0, 0]
    out_weight, out_bias = source["encoder.conv_out.weight"], source["encoder.conv_out.bias"]
    state["encoder.conv_out.weight"] = torch.einsum("oi,ichw->ochw", mix, out_weight) * scale
    state["encoder.conv_out.bias"] = (mix @ out_bias + source["quant_conv.bias"][:half]) * scale
    state["quant_conv.weight"] = torch.eye(half)[:, :, None, None]
    state["quant_conv.bias"] = torch.zeros(half)
    state["post_quant_conv.weight"] = source["post_quant_conv.weight"] / scale
    movq.load_state_dict(state)
    return movq


def train_movq(work: Path, vae: AutoencoderKL, recipe: Recipe) -> VQModel:
    """Train the decoder's spatial norms and weights on; the encoder stays the VAE's. The codebook is k-means'."""
    device = pick_device()
    pictures = data.split_pictures(work, "train", data.world.TRAIN_SIZE)
    torch.manual_seed(3)
    movq = grow_movq(vae).to(device, memory_format=torch.channels_last)
    for part in (movq.encoder, movq.quant_conv, movq.quantize):
        part.requires_grad_(False)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        x = pictures_to_tensor(pictures[np.sort(rows)], device)
        with torch.no_grad():
            z = movq.encode(x).latents
        error = movq.decode(z + 0.03 * torch.randn_like(z), force_not_quantize=True).sample - x
        return error.square().mean() + 0.1 * error.abs().mean()

    movq = train("movq", movq, loss_of, len(pictures), recipe, work, seed=3)
    codes = encode_all(movq, pictures[2000:4000]).permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    movq.quantize.embedding.weight.data.copy_(_kmeans(codes, movq.config.num_vq_embeddings).to(device))
    return movq


def _kmeans(points: torch.Tensor, count: int, rounds: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(rounds):
        owner = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8192)])
        total = torch.zeros_like(centres).index_add_(0, owner, points)
        size = torch.bincount(owner, minlength=count)
        centres[size > 0] = total[size > 0] / size[size > 0, None]
    return centres
