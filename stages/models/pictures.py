"""Pictures in and out of a latent model.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from stages.models.latent import LatentModel

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "pad", "stretch"]
Filter = Literal["lanczos", "bicubic"]


def fit_picture(
    picture: Image, size: int | tuple[int, int], fit: Fit = "crop", resample: Filter = "lanczos"
) -> torch.Tensor:
    """A picture as a tensor (3, H, W) in [-1, 1]; arguments as of `fitted`."""
    values = np.asarray(fitted(picture, size, fit, resample), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def fitted(picture: Image, size: int | tuple[int, int], fit: Fit = "crop", resample: Filter = "lanczos") -> Image:
    """A picture in RGB and of a size.

    crop: the largest part of that shape in the middle, then resized. pad: resized until it fits, the rest white, the
    picture in the middle. stretch: both sides resized. A picture of the right size is left as it is.

    Args:
        size: (W, H), or the side of a square.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    wanted = (size, size) if isinstance(size, int) else size
    method = pil.Resampling[resample.upper()]
    picture = picture.convert("RGB")
    if picture.size == wanted:
        return picture
    if fit == "crop":
        return ImageOps.fit(picture, wanted, method)
    if fit == "pad":
        return ImageOps.pad(picture, wanted, method, color=(255, 255, 255))
    return picture.resize(wanted, method)


def to_picture(x_CHW: torch.Tensor) -> Image:
    """The 8-bit picture of a tensor in [-1, 1]; what lies outside is clipped. Rounds as diffusers' pipelines do."""
    from PIL import Image as pil

    values = (x_CHW.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return pil.fromarray((values * 255).round().astype(np.uint8))


@torch.no_grad()
def encode_pictures(model: LatentModel, pictures: Sequence[Image]) -> torch.Tensor:
    """Latents (B, C, H, W) of pictures as `cropped` has them."""
    return model.encode(cropped(model, pictures))


def cropped(model: LatentModel, pictures: Sequence[Image]) -> torch.Tensor:
    """x_BCHW of pictures that words and inverters are learned from, cropped to the model's size.

    Bicubic and with channels last, where inversion fits by Lanczos and has them first: what was learned from such
    pictures stays as it is, to the last bit.
    """
    x_BCHW = torch.stack([fit_picture(one, model.geometry.picture_size, resample="bicubic") for one in pictures])
    return x_BCHW.contiguous(memory_format=torch.channels_last)
