"""Decode pictures that come from anywhere into RGB, or say in one sentence why not."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.colour import as_srgb

if TYPE_CHECKING:
    from PIL.Image import Image


BYTES_A_PIXEL = 4
"""Of a decoded picture: in what Pillow keeps red, green and blue."""
RASTER = (
    "JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "DIB", "ICO", "ICNS", "PCX", "PSD",
    "SGI", "DDS", "QOI", "XBM",
)  # fmt: skip
"""Of Pillow's formats those that hold pixels. PostScript is a program, which Pillow has Ghostscript run."""
_lifted = threading.Lock()
"""Held while Pillow's limit, which is the process's, is off."""


class PictureError(ValueError):
    """The bytes are no picture that can be used; the message is what the failed row says."""


def decode_picture(
    data: bytes, max_pixels: int, take: Callable[[int], None] = lambda size: None, draft: int | None = None
) -> Image:
    """Encoded bytes to an upright 8-bit RGB picture.

    Colours are converted to sRGB by the embedded ICC profile (Adobe RGB, Display P3, printers' CMYK). Transparency
    (alpha, palette or colour-key) is laid over white, CMYK is converted, 16-bit grey is scaled to 8 bits, an animation
    gives its first frame, and the EXIF orientation is applied.

    Args:
        data: The file's bytes.
        max_pixels: Limit of width x height, checked before anything is decoded.
        take: Told of the bytes that the picture is going to take, before it is decoded; may wait until they are free.
        draft: A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as far as both sides keep so many pixels.

    Raises:
        PictureError: Empty, truncated, not a picture, or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise PictureError("empty picture file (zero bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(data) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise PictureError(f"picture of {width}x{height} pixels is above the limit of {max_pixels}")
                if draft is not None:
                    picture.draft(None, (draft, draft))  # does nothing to other formats
                take(picture.width * picture.height * BYTES_A_PIXEL)
                picture.load()
                return _flatten(as_srgb(ImageOps.exif_transpose(picture), picture.info.get("icc_profile")))
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"not a picture ({len(data)} bytes starting with {data[:8]!r}){_instead(data)}") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"picture is too large: {error}") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, KeyError, IndexError,
            OverflowError, ZeroDivisionError, AttributeError, RuntimeError) as error:  # fmt: skip
        # Pillow's decoders raise all of these for damaged files.
        raise PictureError(f"damaged picture: {error or type(error).__name__}") from None


def _opened(data: bytes) -> Image:
    """A picture before it is decoded, of whatever size its header says: Pillow's own limit is not the job's."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data), formats=RASTER)
    except Image.DecompressionBombError:
        with _lifted:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(io.BytesIO(data), formats=RASTER)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _instead(data: bytes) -> str:
    """What is often found in a picture's place."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return ": it is SVG, which has no pixels; render it first"
    if start.startswith(b"%!ps"):
        return ": it is PostScript, a program that nobody runs here; render it first"
    return ": it is an HTML page" if start.startswith((b"<!doctype html", b"<html", b"<head")) else ""


def _flatten(picture: Image) -> Image:
    import numpy as np
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F":
            top = 1.0 if values.size and values.max() <= 1.0 else 255.0
        else:
            top = 65535.0
        grey = np.clip(np.nan_to_num(values) * (255.0 / top), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def encode_picture(picture: Image) -> bytes:
    """A PIL picture as PNG bytes (lossless)."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()
