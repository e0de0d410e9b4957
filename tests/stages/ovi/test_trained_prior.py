"""Trained priors against the pipeline of diffusers, one prompt at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from stages.engine.randomness import row_generator, row_normal
from stages.ovi.settings import TrainedPrior
from stages.ovi.trained_prior import load_pipeline
from tests.support.prompt_methods import PROMPTS, run
from tests.support.tiny_kandinsky import LENGTH, WIDTH


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_trained_prior_is_the_pipeline_one_prompt_at_a_time(context, prior, rows, batch):
    from diffusers import KandinskyV22PriorPipeline

    pipe = KandinskyV22PriorPipeline.from_pretrained(prior)
    got = run(TrainedPrior(steps=3, guidance=2.0, batch_size=batch), context, rows)
    for row in rows:
        generator = row_generator(3, row["id"], "prior")
        wanted = pipe(row["prompt"], num_inference_steps=3, guidance_scale=2.0, generator=generator).image_embeds[0]
        np.testing.assert_allclose(got[row["id"]]["embedding"], wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_encoders_are_in_memory_once(context, prior, rows, monkeypatch, dtype):
    """The text encoder is the stage's own, whatever the prior's type; the image encoder is not read at all."""
    from transformers import CLIPVisionModelWithProjection

    monkeypatch.setattr("stages.ovi.trained_prior.unasked_dtype", lambda device: getattr(torch, dtype))
    monkeypatch.setattr(CLIPVisionModelWithProjection, "from_pretrained", None)
    before = [weight.clone() for weight in context.text.model.parameters()]
    pipe = load_pipeline(TrainedPrior(), context)
    shared = pipe.text_encoder if dtype == "float32" else pipe.text_encoder.encoder
    assert shared is context.text.model
    assert pipe.prior.dtype == getattr(torch, dtype)
    for weight, was in zip(context.text.model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
        assert weight.dtype == torch.float32
    made = run(TrainedPrior(steps=3), context, rows)
    monkeypatch.undo()
    for name, row in run(TrainedPrior(steps=3), context, rows).items():
        np.testing.assert_allclose(
            made[name]["embedding"], row["embedding"], atol=0 if dtype == "float32" else 0.25
        )  # of up to 4


def test_a_prior_without_time_embedding_equals_one_whose_time_token_nobody_sees(context, rows, tmp_path):
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer

    torch.manual_seed(5)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": WIDTH}
    short = PriorTransformer(**shape, num_embeddings=LENGTH, additional_embeddings=3)
    nn.init.normal_(short.positional_embedding)
    nn.init.normal_(short.prd_embedding)
    short.save_pretrained(tmp_path)
    long = PriorTransformer(**shape, num_embeddings=LENGTH, additional_embeddings=4).eval()
    own = {k: v for k, v in short.state_dict().items() if "time" not in k and k != "positional_embedding"}
    long.load_state_dict(own, strict=False)
    at = LENGTH + 1  # the time token stands behind the text embedding
    position = short.positional_embedding.detach()
    long.positional_embedding.data = torch.cat([position[:, :at], position[:, :1], position[:, at:]], dim=1)
    long.causal_attention_mask[:, :at, at] = -10000.0
    long.causal_attention_mask[:, at + 1 :, at] = -10000.0
    pipe = KandinskyV22PriorPipeline.from_pretrained(context.model)
    t_BE, states, mask = pipe._encode_prompt(PROMPTS, "cpu", 1, False)
    noise = row_normal((WIDTH,), 3, [row["id"] for row in rows], "prior")
    with torch.no_grad():
        wanted = long(noise, 0, t_BE, states, mask).predicted_image_embedding
    got = run(TrainedPrior(prior=str(tmp_path)), context, rows)
    for row, z in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(got[row["id"]]["embedding"], z.numpy(), atol=1e-4)
        assert got[row["id"]]["passes"] == 1
