"""Pictures in and out of a latent model, and how close two of them are.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "pad", "stretch"]


def fit_picture(picture: Image, size: int, fit: Fit = "crop") -> torch.Tensor:
    """A picture as a square (3, size, size) tensor in [-1, 1].

    crop: the largest square in the middle, then resized. pad: resized until the longer side fits, the rest white, the
    picture in the middle. stretch: both sides resized. Resizing is Lanczos; a picture of the right size is left as it
    is.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    picture = picture.convert("RGB")
    if picture.size != (size, size):
        if fit == "crop":
            picture = ImageOps.fit(picture, (size, size), pil.Resampling.LANCZOS)
        elif fit == "pad":
            picture = ImageOps.pad(picture, (size, size), pil.Resampling.LANCZOS, color=(255, 255, 255))
        else:
            picture = picture.resize((size, size), pil.Resampling.LANCZOS)
    values = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def to_picture(x_CHW: torch.Tensor) -> Image:
    """The 8-bit picture of a tensor in [-1, 1]; what lies outside is clipped. Rounds as diffusers' pipelines do."""
    from PIL import Image as pil

    values = (x_CHW.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return pil.fromarray((values * 255).round().astype(np.uint8))


def measure_pictures(seen_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> dict[str, list[float]]:
    """PSNR (dB) and SSIM of each row in [0, 1], by torchmetrics; `seen` is clipped first. Identical rows have infinite
    PSNR.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    seen, wanted = ((x.float() / 2 + 0.5).clamp(0, 1) for x in (seen_BCHW, x_BCHW))
    psnr_B = peak_signal_noise_ratio(seen, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim_B = structural_similarity_index_measure(seen, wanted, data_range=1.0, reduction="none")
    return {"psnr": psnr_B.flatten().tolist(), "ssim": ssim_B.flatten().tolist()}  # type: ignore[union-attr]


def load_lpips(device: torch.device | str) -> Callable[[torch.Tensor, torch.Tensor], list[float]] | None:
    """LPIPS (Alex) on pictures in [-1, 1]; None where torchvision or its weights are not installed."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        measure = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="mean", normalize=False).to(device)
    except (ImportError, OSError):
        return None

    def lpips(seen_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> list[float]:
        pairs = zip(seen_BCHW.float().clamp(-1, 1), x_BCHW.float(), strict=True)
        return [float(measure(seen[None], wanted[None])) for seen, wanted in pairs]

    return lpips


def seed_statistics(z_BCHW: torch.Tensor) -> dict[str, list[float]]:
    """How Gaussian each row's seed is: mean, standard deviation, excess kurtosis, and the mean correlation of
    neighbours.

    White noise has 0, 1, 0, 0 (ours: the correlation is of values one step apart, over rows and columns of each
    channel).
    """
    flat_BN = z_BCHW.double().flatten(1)
    mean_B, std_B = flat_BN.mean(1), flat_BN.std(1, unbiased=False)
    centred = (z_BCHW.double() - mean_B.view(-1, 1, 1, 1)) / std_B.clamp(min=1e-12).view(-1, 1, 1, 1)
    kurtosis_B = centred.pow(4).flatten(1).mean(1) - 3
    across_B = (centred[..., 1:] * centred[..., :-1]).flatten(1).mean(1)
    down_B = (centred[..., 1:, :] * centred[..., :-1, :]).flatten(1).mean(1)
    return {
        "seed_mean": mean_B.tolist(),
        "seed_std": std_B.tolist(),
        "seed_kurtosis": kurtosis_B.tolist(),
        "seed_autocorrelation": ((across_B + down_B) / 2).tolist(),
    }
