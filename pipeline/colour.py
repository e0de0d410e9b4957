"""Colours by the profile that a picture carries: what a viewer shows is what a model sees."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SAME = 2
"""A profile that moves no colour by more than this (of 255) is sRGB by whatever name; its pictures stay as they are."""
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def as_srgb(picture: Image, profile: bytes | None) -> Image:
    """The picture in sRGB, which models are trained on, converted by its embedded ICC profile as viewers do.

    Pictures without a profile, with one that cannot be read or does not fit them, and those with more than 8 bits a
    channel are returned as they are. Transparency is kept.
    """
    if not profile or picture.mode not in ("RGB", "RGBA", "L", "LA", "P", "PA", "CMYK"):
        return picture
    space = _space(profile)
    mode = picture.mode
    if space == "RGB" and mode != "CMYK":
        mode = "RGBA" if mode in ("RGBA", "LA", "PA") or "transparency" in picture.info else "RGB"
        picture = picture.convert(mode)
    elif space != mode:
        return picture
    transform = _to_srgb(profile, mode)
    if transform is None:
        return picture
    from PIL import ImageCms

    converted = ImageCms.applyTransform(picture, transform)
    if mode == "RGBA" and converted is not None:
        converted.putalpha(picture.getchannel("A"))
    return converted or picture


def _profile(data: bytes) -> Any:
    import io

    from PIL import ImageCms

    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(data))
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return None


@lru_cache(64)
def _space(data: bytes) -> str | None:
    """Mode of the pictures that a profile is for."""
    found = _profile(data)
    return None if found is None else SPACES.get(found.profile.xcolor_space)


@lru_cache(64)
def _to_srgb(data: bytes, mode: str) -> Any:
    """What converts pictures of this mode; None where they are sRGB already, or the profile cannot be used.

    Relative colorimetric with black point compensation, as Adobe's programs do it.
    """
    from PIL import Image, ImageCms

    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    out = "RGBA" if mode == "RGBA" else "RGB"
    try:
        transform = ImageCms.buildTransform(
            _profile(data), ImageCms.createProfile("sRGB"), mode, out, ImageCms.Intent.RELATIVE_COLORIMETRIC, flags
        )
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    colours = list(product(range(0, 256, 51), repeat=3))
    grid = Image.new("RGB", (len(colours), 1))
    grid.putdata(colours)
    shown = ImageCms.applyTransform(grid.convert(mode), transform)
    assert shown is not None
    before, after = grid.convert(mode).convert("RGB").tobytes(), shown.convert("RGB").tobytes()
    return None if max(abs(a - b) for a, b in zip(before, after, strict=True)) <= SAME else transform
