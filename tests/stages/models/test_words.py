"""Prompts with new words: as diffusers encodes them, and what is refused."""

from __future__ import annotations

import pytest
import torch

from stages.models.words import Encoder, encode, tokenize, word_id
from tests.support.tiny_stable_diffusion import tokenizer


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts_with_new_words_encode_as_in_diffusers(kind, model, sdxl, tmp_path):
    """The same vectors added to diffusers' own pipeline by load_textual_inversion give the same condition."""
    from diffusers import DiffusionPipeline

    frozen = {"sd": model, "sdxl": sdxl}[kind]
    frozen.pipeline.save_pretrained(tmp_path)
    encoders = frozen.text_encoders
    words = ["<frozen-1>", "<frozen-2>"]
    new_BVE = torch.randn((2, 2, sum(e.width for e in encoders)), generator=torch.Generator().manual_seed(1))
    prompts = ["a <frozen-1> star in <frozen-2>", "photo of a robot that is<frozen-2>, <frozen-1>!"]
    tokens = [[tokenize(e, p, words) for p in prompts] for e in encoders]
    ids, which = ([torch.stack([pair[i] for pair in one]) for one in tokens] for i in (0, 1))
    ours, pooled = encode(encoders, ids, which, new_BVE)
    for b, prompt in enumerate(prompts):
        pipe = DiffusionPipeline.from_pretrained(tmp_path)
        parts = new_BVE[b].split([e.width for e in encoders], dim=-1)
        for suffix, part in zip(("", "_2"), parts, strict=False):
            for word, vector in zip(words, part, strict=True):
                pipe.load_textual_inversion(
                    {word: vector},
                    tokenizer=getattr(pipe, f"tokenizer{suffix}"),
                    text_encoder=getattr(pipe, f"text_encoder{suffix}"),
                )
        made = pipe.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.allclose(ours[b], made[0][0], atol=1e-5)
        if kind == "sdxl":
            assert torch.allclose(pooled[b], made[2][0], atol=1e-5)


def test_tokenize_refuses_what_it_cannot_place():
    encoder = Encoder(tokenizer(), torch.nn.Identity())
    with pytest.raises(ValueError, match="<b>, which is none of <a>"):
        tokenize(encoder, "photo of a <b>", ["<a>"])
    with pytest.raises(ValueError, match="shorten it"):
        tokenize(encoder, "red " * 30, [])
    assert word_id(encoder, "striped") == tokenizer()("striped", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ValueError, match="not one"):
        word_id(encoder, "zebra")
