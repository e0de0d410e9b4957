"""Entering an encoder behind its patch embedding, against the model of transformers itself."""

import pytest
import torch
from torch import nn

from stages.models.vision_tower import VisionTower, token_of_patch
from tests.support.vision_towers import clip_model, full_model, siglip_model


def test_nearest_interpolation():
    """Of the tokens themselves, as the authors do it. Whole numbers, floor(n P / N), differ at (729, 3), ..."""
    for patches in (16, 49, 196, 256, 576, 729):
        for tokens in range(1, min(patches, 64) + 1):
            w_BPD = torch.randn((1, tokens, 2), generator=torch.Generator().manual_seed(tokens))
            wanted = nn.functional.interpolate(w_BPD.mT, size=patches, mode="nearest").mT
            assert torch.equal(w_BPD[:, token_of_patch(patches, tokens)], wanted), (patches, tokens)


@pytest.mark.parametrize("build", [clip_model, siglip_model])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_tower_equals_the_models_forward(build, tokens):
    model = build()
    tower = VisionTower(model, tokens)
    w = torch.randn(5, tokens, tower.width)
    assert (tower(w) - full_model(model, w)).abs().max() < 1e-5
    assert not any(p.requires_grad for p in model.parameters())


def test_compact_with_as_many_tokens_as_patches_is_the_full_tower():
    model = clip_model()
    w = torch.randn(3, 16, 32)
    assert torch.allclose(VisionTower(model, 16, compact=True)(w), VisionTower(model, 16)(w), atol=1e-6)
    small = VisionTower(model, 3, compact=True)
    positions = model.vision_model.embeddings.position_embedding.weight[1:]
    bands = [positions[[n for n in range(16) if n * 3 // 16 == band]].mean(0) for band in range(3)]
    assert torch.allclose(small.positions_ND, torch.stack(bands), atol=1e-6)
    assert small(torch.randn(2, 3, 32)).shape == (2, 24)


def test_tower_refuses_what_it_cannot_enter():
    with pytest.raises(TypeError, match="Linear"):
        VisionTower(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="16 patches"):
        VisionTower(clip_model(), 17)


@pytest.mark.parametrize("build", [clip_model, siglip_model])
def test_hidden_states_are_those_that_the_model_gives_of_a_picture(build):
    """With a token for each patch the tower is entered with a picture's own patches."""
    model = build()
    size = model.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    embeddings = getattr(model, "vision_model", model).embeddings
    tower = VisionTower(model, embeddings.num_patches)
    with torch.no_grad():
        w_BPD = embeddings.patch_embedding(pixels).flatten(2).mT
        seen = model(pixel_values=pixels, output_hidden_states=True)
    for which, wanted in (("last", seen.last_hidden_state), ("penultimate", seen.hidden_states[-2])):
        assert wanted.shape[1:] == (embeddings.num_patches + (build is clip_model), tower.width)
        torch.testing.assert_close(tower.states(w_BPD, which), wanted, atol=1e-5, rtol=1e-5)
    assert VisionTower(model, 3, compact=True).states(w_BPD[:, :3], "last").shape[1] == 3 + (build is clip_model)
