"""Preparing pictures against the model's own processor."""

from __future__ import annotations

import pytest
import torch

from stages.embed.preparation import Preparation
from tests.support.pictures import awkward_pictures


def _processors() -> dict[str, object]:
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    return {
        "clip": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        "clip, small crop": CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 31, "width": 20}),
        "siglip": SiglipImageProcessor(size={"height": 24, "width": 40}),
        "no resizing": CLIPImageProcessor(do_resize=False, crop_size={"height": 30, "width": 30}),
    }


@pytest.mark.parametrize("name", ["clip", "clip, small crop", "siglip", "no resizing"])
def test_preparation_equals_the_processor(name: str) -> None:
    processor = _processors()[name]
    preparation = Preparation(processor, "cpu")
    assert preparation.is_split
    for picture in awkward_pictures():
        wanted = processor(images=picture, return_tensors="pt").pixel_values
        found = preparation.batch([preparation.one(picture)])
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-5


def test_an_unusual_processor_does_the_work_itself() -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    )
    preparation = Preparation(processor, "cpu")
    assert not preparation.is_split
    picture = awkward_pictures()[1]
    wanted = processor(images=picture, return_tensors="pt").pixel_values
    assert torch.equal(preparation.batch([preparation.one(picture)]), wanted)
