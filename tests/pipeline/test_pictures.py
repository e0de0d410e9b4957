"""Colours by embedded profiles: a viewer and a model see the same."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms

from pipeline.pictures import RASTER, PictureError, decode_picture

LIMIT = 1_000_000


def _srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _turned() -> bytes:
    """A profile whose red is sRGB's green and the other way round: what a viewer shows has both swapped."""
    data = _srgb()
    for old, new in ((b"rXYZ", b"tmp1"), (b"gXYZ", b"rXYZ"), (b"tmp1", b"gXYZ")):
        data = data.replace(old, new)
    return data


def _saved(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _pixel(data: bytes) -> list[int]:
    picture = decode_picture(data, LIMIT)
    assert picture.mode == "RGB"
    return np.asarray(picture)[2, 2].tolist()


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_an_embedded_profile_says_what_the_numbers_mean(form: str, options: dict[str, object]) -> None:
    red = Image.new("RGB", (8, 8), (220, 40, 90))
    assert np.allclose(_pixel(_saved(red, form, icc_profile=_turned(), **options)), [40, 220, 90], atol=4)
    assert np.allclose(_pixel(_saved(red, form, **options)), [220, 40, 90], atol=4)


def _photograph(side: int) -> Image.Image:
    """Something smooth with edges and a little noise."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y * x), np.sign(np.sin(13 * x) * np.sin(11 * y))], axis=-1)
    noise = np.random.default_rng(0).normal(0, 3, (side, side, 3))
    return Image.fromarray((120 + 80 * waves + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("draft", "side"), [(None, 1000), (1000, 1000), (501, 1000), (500, 500), (251, 500), (60, 125)]
)
def test_a_jpeg_is_decoded_no_smaller_than_asked_for(draft: int | None, side: int) -> None:
    data, taken = _saved(_photograph(1000), "JPEG", quality=90), list[int]()
    picture = decode_picture(data, LIMIT, taken.append, draft)
    assert picture.size == (side, side)
    assert taken == [side * side * 4]
    if draft is None:
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(data))))
    with pytest.raises(PictureError, match="1000x1000 pixels is above the limit"):
        decode_picture(data, LIMIT - 1, draft=draft)


def test_a_draft_of_twice_the_size_is_the_picture_all_the_same() -> None:
    """Resized to a model's 224, against all pixels; other formats, profiles and orientations are as without it."""
    data = _saved(_photograph(1000), "JPEG", quality=90)
    whole, draft = (
        np.asarray(decode_picture(data, LIMIT, draft=side).resize((224, 224), Image.Resampling.BICUBIC), dtype=float)
        for side in (None, 448)
    )
    assert 0 < np.abs(whole - draft).mean() < 1.0
    assert np.abs(whole - draft).max() < 24
    assert decode_picture(_saved(_photograph(1000), "PNG"), LIMIT, draft=100).size == (1000, 1000)
    wide = Image.new("RGB", (800, 400), (220, 40, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_picture(_saved(wide, "JPEG", exif=exif, icc_profile=_turned()), LIMIT, draft=100)
    assert turned.size == (100, 200)
    assert np.allclose(np.asarray(turned)[50, 50], [40, 220, 90], atol=6)
    grey = decode_picture(_saved(wide.convert("L"), "JPEG"), LIMIT, draft=100)
    assert (grey.size, grey.mode) == ((200, 100), "RGB")
    inks = decode_picture(_saved(wide.convert("CMYK"), "JPEG"), LIMIT, draft=100)
    assert (inks.size, inks.mode) == ((200, 100), "RGB")


def test_pictures_in_srgb_stay_as_they_are() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for profile in (_srgb(), _srgb().replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))):
        decoded = decode_picture(_saved(noise, "PNG", icc_profile=profile), LIMIT)
        assert np.array_equal(np.asarray(decoded), np.asarray(noise))


def test_transparency_is_laid_over_white_after_conversion() -> None:
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert np.allclose(_pixel(_saved(half, "PNG", icc_profile=_turned())), [127, 255, 127], atol=3)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert _pixel(_saved(clear, "PNG", icc_profile=_turned())) == [255, 255, 255]
    keyed = Image.new("RGB", (8, 8), (255, 0, 0))
    assert _pixel(_saved(keyed, "PNG", icc_profile=_turned(), transparency=(255, 0, 0))) == [255, 255, 255]


def test_palettes_and_grey_under_a_colour_profile() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert _pixel(_saved(palette, "PNG", icc_profile=_turned())) == [0, 255, 0]
    grey = Image.new("L", (8, 8), 120)
    assert np.allclose(_pixel(_saved(grey, "PNG", icc_profile=_turned())), [120, 120, 120], atol=2)


@pytest.mark.parametrize(
    "profile", [b"no profile at all", b"", _srgb()[:100], b"\0" * 600], ids=["words", "empty", "cut", "zeros"]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
def test_a_profile_that_cannot_be_used_is_passed_over(profile: bytes, mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    picture = Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode)
    assert np.allclose(_pixel(_saved(picture, form, icc_profile=profile)), [200, 200, 200], atol=1)


def test_a_profile_for_other_pictures_is_passed_over() -> None:
    picture = Image.new("CMYK", (8, 8), (0, 200, 200, 0))
    assert _pixel(_saved(picture, "TIFF", icc_profile=_turned())) == _pixel(_saved(picture, "TIFF"))
    turned = _saved(Image.new("RGB", (8, 4), (220, 40, 90)), "JPEG", icc_profile=_turned(), exif=_quarter_turn())
    assert decode_picture(turned, LIMIT).size == (4, 8)


def _quarter_turn() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_the_limit_is_the_job_s_and_not_pillow_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses what has more than twice its own limit, however large `max_pixels` is."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    assert decode_picture(buffer.getvalue(), 100).getpixel((7, 7)) == (1, 2, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(PictureError, match="picture of 8x8 pixels is above the limit of 50"):
        decode_picture(buffer.getvalue(), 50)


def test_a_strangers_program_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: PostScript in a picture's place was run, by Ghostscript where it is installed."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\nexec sleep 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\nshowpage\n%%EOF\n"
    with pytest.raises(PictureError, match="it is PostScript"):
        decode_picture(program, 10**6)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", sorted({*RASTER} - {"ICNS", "PSD", "QOI", "XBM"}))
def test_what_holds_pixels_is_read(form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(file, form)
    assert decode_picture(file.getvalue(), 10**6).size == (64, 64)
