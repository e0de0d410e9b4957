"""Encoders against the pipeline that they are parts of."""

import pytest
import torch

from stages.models import clip
from tests.support.prompt_methods import PROMPTS
from tests.support.tiny_kandinsky import WIDTH, build_prior


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return build_prior(tmp_path_factory.mktemp("prior"))


def test_text_embeddings_are_the_pipelines(prior):
    from diffusers import KandinskyV22PriorPipeline

    pipe = KandinskyV22PriorPipeline.from_pretrained(prior)
    wanted = pipe._encode_prompt(PROMPTS, "cpu", 1, False)[0]
    got = clip.TextEncoder(prior)(PROMPTS)
    assert (got - wanted).abs().max() < 1e-5


def test_image_encoder_is_the_pipelines(prior):
    from diffusers import KandinskyV22PriorPipeline

    pipe = KandinskyV22PriorPipeline.from_pretrained(prior)
    encoder = clip.ImageEncoder(prior)
    assert torch.allclose(encoder.zero_embedding(), pipe.get_zero_embed()[0], atol=1e-5)
    assert clip.embedding_width(prior) == WIDTH
    assert clip.vision_width(prior) == 32


def test_encoders_name_what_is_missing(tmp_path):
    with pytest.raises(clip.ModelError, match="nowhere"):
        clip.TextEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(clip.ModelError, match="nowhere"):
        clip.identity(str(tmp_path / "nowhere"), "image")
