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


def test_prompts_are_read_to_their_ends_and_mean_what_they_mean_at_full_length(prior):
    """Against transformers at the whole context, a prompt at a time; among them one that fills it, and an empty one."""
    encoder = clip.TextEncoder(prior)
    prompts = ["", "a red star", " ".join(["a red star"] * 40), "two blue rings on the left of a green moon"]
    for some in (prompts, prompts[:2]):
        got = encoder(some)
        for prompt, own in zip(some, got, strict=True):
            whole = encoder.tokenizer(
                prompt, padding="max_length", truncation=True, max_length=encoder.length, return_tensors="pt"
            )
            with torch.inference_mode():
                wanted = encoder.model(**whole).text_embeds[0]
            assert (own - wanted).abs().max() < 1e-5
    seen = []
    encoder.model.register_forward_pre_hook(
        lambda model, given, options: seen.append(options["input_ids"].shape), with_kwargs=True
    )
    encoder(prompts[:2])
    assert seen[0][1] < encoder.length


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("told", [True, False], ids=["end of text told", "the largest id"])
def test_the_token_that_is_read_is_the_one_that_the_model_pools(prior, side, told):
    """Also where a prompt spells the end of text itself; the other tokens' last states may be anything."""
    encoder = clip.TextEncoder(prior)
    encoder.tokenizer.padding_side = side
    tower = encoder.model.text_model
    tower.eos_token_id = encoder.tokenizer.eos_token_id if told else 2
    prompts = ["a red star", f"a red {encoder.tokenizer.eos_token} star", "", " ".join(["a red star"] * 40), "two blue"]
    ids_BL, mask_BL, _ = encoder._tokens(prompts)
    with torch.inference_mode():
        wanted_BE = encoder.model(input_ids=ids_BL, attention_mask=mask_BL).text_embeds
    seen = []
    tower.encoder.layers[-1].layer.mlp.register_forward_pre_hook(lambda mlp, given: seen.append(given[0].shape))
    assert (encoder(prompts) - wanted_BE).abs().max() < 1e-5
    assert sum(shape[0] for shape in seen) == len(prompts)
    assert all(len(shape) == 2 for shape in seen) == (side == "right")


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_and_their_counts_are_the_tokenizers_own(prior, side):
    encoder = clip.TextEncoder(prior)
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = side
    prompts = ["", "two blue rings", *(" ".join(["a"] * n) for n in range(1, 2 * encoder.length))]
    ids_BL, mask_BL, counts = encoder._tokens(prompts)
    wanted = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=encoder.length, return_tensors="pt"
    )  # fmt: skip
    assert torch.equal(ids_BL, wanted.input_ids)
    assert torch.equal(mask_BL, wanted.attention_mask)
    alone = [len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
    assert counts == alone
    assert min(alone) < encoder.length < max(alone)
    assert encoder.length in alone
    assert encoder.counted(prompts, batch=7)[1] == alone


def test_an_activation_in_place_changes_no_bit_and_lets_gradients_through(prior):
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
    from transformers.activations import QuickGELUActivation

    for kind, part, ours in (
        (CLIPTextModelWithProjection, "text_encoder", clip.TextEncoder(prior).model),
        (CLIPVisionModelWithProjection, "image_encoder", clip.ImageEncoder(prior).model),
    ):
        stock = kind.from_pretrained(prior, subfolder=part).requires_grad_(False)
        assert sum(isinstance(module, QuickGELUActivation) for module in stock.modules())
        assert not any(isinstance(module, QuickGELUActivation) for module in ours.modules())
        draw = torch.Generator().manual_seed(0)
        given = {"input_ids": torch.randint(0, 20, (3, 9), generator=draw)}
        if part == "image_encoder":
            given = {"pixel_values": torch.randn(3, 3, 32, 32, generator=draw)}
        for name, value in ours(**given).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, stock(**given)[name])
    x = torch.randn(4, 5, generator=draw, requires_grad=True)
    (wanted,) = torch.autograd.grad(QuickGELUActivation()(x).sum(), x)
    (found,) = torch.autograd.grad(clip.QuickGelu()(x).sum(), x)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
