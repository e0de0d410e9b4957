"""An image processor's work, split: what is done to a picture in threads, and what to a batch on the device.

Legend: B rows of a batch, H W C picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

TOLERANCE = 1e-5
EXTREME = 100
"""A picture that would become longer than this many crops is resized within the crop alone."""
REACH = 4
"""Pixels that Pillow's filters read to either side, at most: of the picture, or of the result where that is smaller."""
THINNEST = 200
"""Ratio of the sides beyond which a processor that crops by itself is not asked: it resizes the whole picture first."""


@dataclass(frozen=True)
class PixelTransform:
    """What an image processor does, in the order in which it does it.

    Attributes:
        short: Length that the shorter edge is resized to, or None.
        size: (height, width) that a picture is resized to, or None.
        resample: Pillow's filter.
        crop: (height, width) cut from the middle, or None.
        scale, mean_C, std_C: ``(x * scale - mean) / std`` on bytes.
    """

    short: int | None
    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]

    @staticmethod
    def of(processor: Any) -> PixelTransform | None:
        """What a processor of transformers does; None where it asks for something else."""
        settings = processor.to_dict()
        size, crop = dict(settings.get("size") or {}), dict(settings.get("crop_size") or {})
        resize = settings.get("do_resize", False)
        known = not resize or set(size) in ({"shortest_edge"}, {"height", "width"})
        if not known or settings.get("do_pad") or not settings.get("do_rescale") or not settings.get("do_normalize"):
            return None
        return PixelTransform(
            short=size["shortest_edge"] if resize and "shortest_edge" in size else None,
            size=(size["height"], size["width"]) if resize and "height" in size else None,
            resample=int(settings["resample"]),
            crop=(crop["height"], crop["width"]) if settings.get("do_center_crop") else None,
            scale=float(settings["rescale_factor"]),
            mean_C=tuple(settings["image_mean"]),
            std_C=tuple(settings["image_std"]),
        )

    def shape(self, picture: Image) -> np.ndarray:
        """The resized and cropped picture as bytes (H, W, C); Pillow does the work with the interpreter released."""
        width, height = picture.size
        if self.size is not None:
            height, width = self.size
        elif self.short is not None:
            long = int(self.short * max(width, height) / min(width, height))
            width, height = (self.short, long) if width <= height else (long, self.short)
        if self.crop is not None and max(width, height) > EXTREME * max(self.crop):
            return self._window(picture, width, height, self.crop)
        if picture.size != (width, height):
            picture = picture.resize((width, height), resample=self.resample)
        if self.crop is None or self.crop == (height, width):
            return np.asarray(picture)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        if top < 0 or left < 0:
            raise ValueError(f"a picture of {width}x{height} is smaller than the crop of {self.crop[1]}x{self.crop[0]}")
        return np.asarray(picture)[top : top + self.crop[0], left : left + self.crop[1]]

    def _window(self, picture: Image, width: int, height: int, crop: tuple[int, int]) -> np.ndarray:
        """What the crop shows of the picture at this size, without the rest, which may be a million pixels long.

        As `shape` gives it, but for rounding: of the picture only what the filter reaches is resized, across first and
        then down, as Pillow does it.
        """
        high, wide = crop
        top, left = (height - high) // 2, (width - wide) // 2
        if top < 0 or left < 0:
            raise ValueError(f"a picture of {width}x{height} is smaller than the crop of {wide}x{high}")
        across, down = picture.width / width, picture.height / height  # pixels of the picture for one of the result
        x, right = _reached(left, wide, across, picture.width)
        y, bottom = _reached(top, high, down, picture.height)
        part = picture.crop((x, y, right, bottom))
        columns = (left * across - x, 0, (left + wide) * across - x, part.height)
        part = part.resize((wide, part.height), self.resample, columns)
        return np.asarray(part.resize((wide, high), self.resample, (0, top * down - y, wide, (top + high) * down - y)))


def _reached(start: int, length: int, scale: float, limit: int) -> tuple[int, int]:
    """The picture's pixels that a filter reads for ``length`` pixels of the result from ``start`` on."""
    reach = REACH * max(1.0, scale)
    return max(0, floor(start * scale - reach)), min(limit, ceil((start + length) * scale + reach))


class Preparation:
    """An image processor's work, split: Pillow's part a picture, in threads; the arithmetic a batch, on the device.

    At the start it is compared with the processor on pictures of awkward sizes. Where the two differ by more than
    `TOLERANCE` (a processor on another backend, or of another kind), the processor itself does the work.
    """

    def __init__(self, processor: Any, device: str) -> None:
        self._processor = processor
        self._device = device
        transform = PixelTransform.of(processor)
        self._transform = transform if transform is not None and _agrees(transform, processor) else None

    @property
    def is_split(self) -> bool:
        return self._transform is not None

    def one(self, picture: Image) -> torch.Tensor:
        """A picture, ready to be stacked: bytes (H, W, C), or the processor's own floats (C, H, W)."""
        if self._transform is not None:
            return torch.from_numpy(np.array(self._transform.shape(picture)))
        if max(picture.size) > THINNEST * min(picture.size):
            raise ValueError(f"{picture.width} and {picture.height} pixels are too unequal sides for this processor")
        return self._processor(images=picture, return_tensors="pt").pixel_values[0]

    def batch(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Pixel values (B, C, H, W), float32, on the device."""
        stacked = torch.stack(pictures)
        if self._device.startswith("cuda"):
            stacked = stacked.pin_memory()
        stacked = stacked.to(self._device, non_blocking=True)
        return _normalised(stacked, self._transform) if self._transform is not None else stacked


def _normalised(x_BHWC: torch.Tensor, transform: PixelTransform) -> torch.Tensor:
    mean_C, std_C = (torch.tensor(v, device=x_BHWC.device) for v in (transform.mean_C, transform.std_C))
    return ((x_BHWC.float() * transform.scale - mean_C) / std_C).permute(0, 3, 1, 2).contiguous()


def _agrees(transform: PixelTransform, processor: Any) -> bool:
    from PIL import Image

    rng = np.random.default_rng(0)
    for height, width in ((37, 53), (301, 211), (640, 641)):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        theirs = processor(images=picture, return_tensors="pt").pixel_values
        ours = _normalised(torch.from_numpy(np.array(transform.shape(picture)))[None], transform)
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > TOLERANCE:
            return False
    return True
