"""The real sizes, without the weights: each published model loads and inverts one picture.

Asked for with ``LATENTMILL_FULL_SIZE=sd15,sd21,sdxl`` (or some of them): up to 14 GB of disk and 20 GB of memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from tests.support import full_size
from tests.support.tiny_stable_diffusion import tokenizer

SIZE, STEPS = 256, 2
ASKED = os.environ.get("LATENTMILL_FULL_SIZE", "").split(",")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_a_published_size_loads_and_inverts(kind: str, tmp_path: Path) -> None:
    if kind not in ASKED:
        pytest.skip(f"asked for with LATENTMILL_FULL_SIZE={kind}")
    assert full_size.build(kind, tmp_path, tokenizer(77)) == full_size.PARAMETERS[kind]
    gpu = torch.cuda.is_available()
    methods = [{"method": "ddim"}, {"method": "lbo", "passes": 2}]
    settings = InvertImagesSettings(
        model=str(tmp_path), methods=methods, steps=STEPS, size=SIZE, slots=1, dtype="float16" if gpu else "float32"
    )
    described = InvertImages.describe(settings)
    shapes = {column.name: column.shape for column in described.columns if column.kind == "tensor"}
    assert shapes["latent"] == (4, SIZE // 8, SIZE // 8)
    assert shapes["residual"] == (STEPS,)
    stage = InvertImages(settings)
    assert type(stage.model).__name__ == ("StableDiffusionXL" if kind == "sdxl" else "StableDiffusion")
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for method in ("ddim", "lbo"):
        (row,) = stage([{"id": method, "image": Image.fromarray(noise), "prompt": "photo of a star", "method": method}])
        assert row["status"] == "ok", row["error"]
        assert row["latent"].shape == (4, SIZE // 8, SIZE // 8)
        assert np.isfinite(row["latent"]).all()
        assert np.isfinite(row["psnr_decoded"])
        assert len(row["residual"]) == STEPS
