"""The two stages around an inverter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stages.inverter.model import InverterShape, TextInverter
from stages.inverter.settings import DrawPairsSettings, InvertTextSettings
from stages.inverter.stage import DrawPairs, InvertText
from tests.stages.inverter.test_training import SMALL


def test_pictures_are_drawn_from_seed_and_id_and_latents_are_theirs(folder, model):
    rows = [{"id": str(i), "prompt": p} for i, p in enumerate(("red star", "", "blue heart", "red star"))]
    rows[1]["prompt"] = None
    settings = DrawPairsSettings(model=folder, steps=2, guidance=3.0, batch_size=2, device="cpu", seed=4)
    drawn = {row["id"]: row for row in DrawPairs(settings)(rows)}
    assert drawn["1"]["status"] == "failed"
    assert "prompt is empty" in drawn["1"]["error"]
    alone = next(iter(DrawPairs(settings.model_copy(update={"batch_size": 1}))([dict(rows[3])])))
    assert np.abs(alone["latent"] - drawn["3"]["latent"]).max() < 1e-4
    assert np.abs(drawn["0"]["latent"] - drawn["3"]["latent"]).max() > 1e-2  # the same prompt, another id
    pixels = torch.from_numpy(np.array(drawn["0"]["image"])).float().permute(2, 0, 1)[None] / 127.5 - 1
    expected = model.pipeline.vae.encode(pixels).latent_dist.mean * model.pipeline.vae.config.scaling_factor
    assert np.abs(expected[0].numpy() - drawn["0"]["latent"]).max() < 1e-5


def test_pictures_to_text_latents(folder, tmp_path):
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL))
    inverter.save(str(tmp_path))
    settings = InvertTextSettings(inverter=str(tmp_path), model=folder, device="cpu", batch_size=2)
    info = InvertText.describe(settings)
    assert info.columns[0].shape == (16, 32)
    rows = [{"id": str(i), "image": Image.new("RGB", (30, 20), (i * 60, 20, 90))} for i in range(3)]
    rows.append({"id": "3", "image": None})
    given = {row["id"]: row for row in InvertText(settings)(rows)}
    assert given["3"]["status"] == "failed"
    assert given["0"]["text_latent"].shape == (16, 32)
    assert not np.allclose(given["0"]["text_latent"], given["2"]["text_latent"])
    TextInverter(InverterShape(text=(16, 32), **(SMALL | {"latent": (4, 4, 4)}))).save(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="set size"):
        InvertText.describe(InvertTextSettings(inverter=str(tmp_path / "other"), model=folder))
