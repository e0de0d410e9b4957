"""Cells as the page draws them: thumbnails of pictures, figures and a curve of a vector, a latent as a tiny picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.view.query import BadRequest

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIZES = (96, 192, 384, 1024)
"""Longest sides that are drawn; a smaller picture keeps its pixels."""
MAX_PIXELS = 100_000_000
POINTS = 64


def thumbnail(data: bytes | None, size: int) -> tuple[str, bytes]:
    """A picture's content type and bytes, always encoded again: what a stranger stored is not served as it is.

    Raises:
        BadRequest: There is no picture, or it cannot be decoded.
    """
    from pipeline.pictures import PictureError, decode_picture

    if data is None:
        raise BadRequest("this row has no picture there")
    try:
        picture = decode_picture(data, MAX_PIXELS, draft=checked(size))
    except PictureError as error:
        raise BadRequest(f"the picture cannot be shown: {error}") from None
    return drawn(picture, size)


def checked(size: int) -> int:
    """
    Raises:
        BadRequest: It is none of `SIZES`.
    """
    if size not in SIZES:
        raise BadRequest(f"size: one of {', '.join(map(str, SIZES))}")
    return size


def drawn(picture: Image, size: int) -> tuple[str, bytes]:
    """A picture's content type and bytes, at most so large."""
    from PIL import Image

    picture.thumbnail((checked(size), size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= 192:
        picture.save(buffer, "PNG")
        return "image/png", buffer.getvalue()
    picture.save(buffer, "WEBP", quality=88)
    return "image/webp", buffer.getvalue()


def summary(values: Sequence[float] | None, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """A vector in figures: ``size``, ``norm``, ``mean``, ``min``, ``max`` and a curve of at most 64 points.

    A longer vector's curve has the mean of each stretch. What is not finite is counted and left out of the figures.
    """
    import numpy as np

    if values is None:
        return None
    given = np.asarray(values, dtype=np.float64)
    real = given[np.isfinite(given)]
    told: dict[str, Any] = {"size": given.size, "shape": list(shape), "not_finite": given.size - real.size}
    if not real.size:
        return told
    stretches = np.array_split(given, min(POINTS, given.size))
    curve = [
        float(stretch[np.isfinite(stretch)].mean()) if np.isfinite(stretch).any() else None for stretch in stretches
    ]
    return told | {"norm": math.sqrt(float(real @ real)), "mean": float(real.mean()), "min": float(real.min()),
                   "max": float(real.max()), "curve": curve}  # fmt: skip


def latent(values: Sequence[float] | None, shape: tuple[int, ...]) -> tuple[str, bytes]:
    """A latent (C, H, W) as a PNG: its first three channels as red, green and blue, each from its 2nd to its 98th
    percentile; of one channel or two the first in grey.

    Raises:
        BadRequest: There is none, or it has no picture's shape.
    """
    import numpy as np
    from PIL.Image import fromarray

    if values is None or len(shape) != 3 or not 2 <= min(shape[1:]) <= max(shape[1:]) <= 1024:
        raise BadRequest("this vector has no shape that could be drawn")
    z_CHW = np.nan_to_num(np.asarray(values, dtype=np.float64).reshape(shape))
    shown_HWC = np.stack([_stretched(z_HW) for z_HW in (z_CHW[:3] if len(z_CHW) >= 3 else z_CHW[[0, 0, 0]])], -1)
    return "image/png", _png(fromarray(shown_HWC))


def _png(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _stretched(z_HW: np.ndarray) -> np.ndarray:
    import numpy as np

    low, high = np.percentile(z_HW, [2, 98])
    return (np.clip((z_HW - low) / ((high - low) or 1.0), 0, 1) * 255).round().astype(np.uint8)
