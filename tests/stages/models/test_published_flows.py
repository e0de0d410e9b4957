"""Transformers of rectified flows as published: their sizes on the meta device, and their configurations read from a
folder without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.models.families import read_geometry
from stages.models.settings import LatentModelSettings
from tests.support.full_size import FLOWS, classes, write_flow_configs


@pytest.mark.parametrize("name", list(FLOWS))
def test_a_published_model_is_read_and_has_its_size(tmp_path: Path, name: str) -> None:
    import diffusers

    family, transformer, _, billions, tokens = FLOWS[name]
    kind = getattr(diffusers, classes(family)[0])
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(**transformer).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=1e-9 if family == "Flux" else 5e-3)

    write_flow_configs(name, tmp_path)
    geometry = read_geometry(LatentModelSettings(model=str(tmp_path)))
    packed = {"Flux2": (128, 64, 64), "Flux2Klein": (128, 64, 64), "QwenImage21": (64, 64, 64)}
    latents = packed.get(family, (16, 128, 128))
    assert (geometry.picture_size, geometry.latent_shape) == ((1024, 1024), latents)
    assert geometry.text_shape[0] == tokens
    assert geometry.sizes.multiple == (32 if family == "QwenImage21" else 16)
    assert len(geometry.at(832, 1216).schedule(28)) == 28
