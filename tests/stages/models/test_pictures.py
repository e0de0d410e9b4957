"""Pictures on their way to the encoder."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from stages.models.families import open_latent_model
from stages.models.pictures import encode_pictures, fit_picture, to_picture
from stages.models.settings import LatentModelSettings
from tests.support.tiny_stable_diffusion import build


def noisy(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_filter_is_the_one_asked_for() -> None:
    picture = noisy(50, 30)
    for name, method in (("lanczos", Image.Resampling.LANCZOS), ("bicubic", Image.Resampling.BICUBIC)):
        wanted = np.asarray(ImageOps.fit(picture, (16, 16), method), dtype=np.float32) / 127.5 - 1
        assert np.array_equal(fit_picture(picture, 16, resample=name).permute(1, 2, 0).numpy(), wanted)


def test_latents_of_pictures_for_words_and_inverters(tmp_path) -> None:
    model = open_latent_model(LatentModelSettings(model=build(tmp_path), device="cpu"))
    given = [noisy(50, 30), noisy(16, 16)]
    fitted = [np.asarray(ImageOps.fit(one, (16, 16), Image.Resampling.BICUBIC), dtype=np.float32) for one in given]
    x_BHWC = torch.from_numpy(np.stack(fitted) / 127.5 - 1)
    assert torch.equal(encode_pictures(model, given), model.encode(x_BHWC.permute(0, 3, 1, 2)))


def test_fitting_rules() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    assert fit_picture(wide, 10, "crop").shape == (3, 10, 10)
    assert bool((fit_picture(wide, 10, "crop")[0] == 1).all())
    padded = fit_picture(wide, 10, "pad")
    assert bool((padded[:, 0] == 1).all())
    assert float(padded[1, 5, 5]) == -1
    same = noisy(16, 16)
    assert np.array_equal(np.asarray(to_picture(fit_picture(same, 16))), np.asarray(same))
