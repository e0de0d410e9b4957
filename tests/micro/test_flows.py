"""The flow models' building blocks: formats that stock diffusers loads, packing, guidance in one pass, few steps."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusion3Pipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer

from micro import MODELS, assemble, autoencoder, autoencoder16, clip, evaluate, flows, oracle, t5, world
from micro.training import Recipe, halve_products

_CAPTIONS = np.array([[world.caption_of(i, "heldout", wording=k) for k in range(6)] for i in range(60)])


@pytest.fixture(scope="module")
def words() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODELS / "stable-diffusion" / "tokenizer")


@pytest.fixture(scope="module")
def t5_words(tmp_path_factory) -> T5Tokenizer:
    folder = tmp_path_factory.mktemp("t5")
    t5.learn(_CAPTIONS.reshape(-1).tolist(), folder)
    return T5Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pooled() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(MODELS / "stable-diffusion" / "text_encoder", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def aligned() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection.from_pretrained(MODELS / "prior" / "text_encoder", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus(words, t5_words) -> flows.Corpus:
    from micro import data

    scenes = [world.sample_scene(i, "heldout") for i in range(60)]
    names = tuple(world.BACKGROUNDS)
    return flows.Corpus(
        np.random.default_rng(0).normal(size=(60, 16, 8, 8)).astype(np.float16),
        np.stack([data.labels(s) for s in scenes]), np.array([names.index(s.background) for s in scenes]),
        clip.tokenize_all(words, _CAPTIONS), t5.tokenize_all(t5_words, _CAPTIONS).astype(np.int16),
        (clip.tokenize_all(words, np.array([""]))[0], t5.tokenize_all(t5_words, np.array([""]))[0]),
    )  # fmt: skip


def _lively(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, so that no output is zero by initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return module.eval()


@pytest.fixture(scope="module")
def flux(pooled, t5_words, corpus) -> flows.Flow:
    return _lively(flows.Flow(flows.build_flux(), flows.FluxText(pooled, t5.build(t5_words)), corpus.pairings))


def test_captions_become_whole_words_and_anything_else_characters(t5_words):
    assert t5_words.tokenize("a large red circle, a moon") == [
        "▁a", "▁large", "▁red", "▁circle", ",", "▁a", "▁moon"
    ]  # fmt: skip
    ids = t5_words("Red zebra-like thing 7!").input_ids
    assert t5_words.unk_token_id not in ids
    assert t5_words.decode(ids, skip_special_tokens=True) == "Red zebra-like thing 7!"
    assert (t5.tokenize_all(t5_words, _CAPTIONS)[..., -1] == t5_words.pad_token_id).all()  # none is cut


def test_packing_is_the_pipelines():
    z = torch.randn(2, 16, 8, 8)
    theirs = FluxPipeline._pack_latents(z, 2, 16, 8, 8)
    assert torch.equal(flows.pack(z), theirs)
    assert torch.equal(flows.unpack(theirs), z)


def test_flux_draws_in_diffusers_what_a_plain_loop_draws(flux, pooled, words, t5_words, tmp_path):
    vae = _lively(autoencoder16.build())
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.8)
    made = assemble.flux(vae, pooled, words, flux.text.t5, t5_words, flux.transformer)
    made.save_pretrained(tmp_path / "flux")
    stock = FluxPipeline.from_pretrained(tmp_path / "flux")
    stock.set_progress_bar_config(disable=True)
    noise, prompt, steps = torch.randn(1, 16, 8, 8), "a red star above a blue moon", 3
    theirs = stock(prompt, height=64, width=64, num_inference_steps=steps, guidance_scale=2.0, output_type="latent",
                   max_sequence_length=t5.LENGTH, latents=flows.pack(noise)).images  # fmt: skip

    clip_ids, t5_ids = (torch.from_numpy(ids) for ids in (clip.tokenize_all(words, np.array([prompt])),
                                                          t5.tokenize_all(t5_words, np.array([prompt]))))  # fmt: skip
    x = noise
    with torch.no_grad():
        said = flux.text(clip_ids, t5_ids)
        plain = np.linspace(1, 1 / steps, steps)
        sigmas = [*(np.exp(flux.shift) / (np.exp(flux.shift) + 1 / plain - 1)), 0.0]
        for s, after in pairwise(sigmas):
            v = flux.velocity(
                x, torch.full((1,), s, dtype=torch.float32), said.hidden, said.pooled, torch.full((1,), 2.0)
            )
            x = x + (after - s) * v
    torch.testing.assert_close(flows.unpack(theirs), x, atol=2e-4, rtol=1e-3)
    assert stock(prompt, height=64, width=64, num_inference_steps=1, max_sequence_length=32).images[0].size == (64, 64)


def test_stable_diffusion_3_draws_in_diffusers_what_a_plain_loop_draws(
    pooled, aligned, words, t5_words, corpus, tmp_path
):
    text = flows.SD3Text(aligned, flows.pooling(pooled), t5.build(t5_words))
    sd3 = _lively(flows.Flow(flows.build_sd3(), text, corpus.pairings))
    made = assemble.sd3(autoencoder16.build(), aligned, text.clips[1], words, text.t5, t5_words, sd3.transformer)
    made.save_pretrained(tmp_path / "sd3")
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path / "sd3")
    stock.set_progress_bar_config(disable=True)
    noise, prompt, steps = torch.randn(1, 16, 8, 8), "two striped hearts", 2
    theirs = stock(prompt, height=64, width=64, num_inference_steps=steps, guidance_scale=3.0, output_type="latent",
                   max_sequence_length=t5.LENGTH, latents=noise).images  # fmt: skip

    def read(caption: str) -> flows.Said:
        ids = clip.tokenize_all(words, np.array([caption])), t5.tokenize_all(t5_words, np.array([caption]))
        return text(*(torch.from_numpy(i) for i in ids))

    made.scheduler.set_timesteps(steps)
    x, sigmas = noise, made.scheduler.sigmas.tolist()
    with torch.no_grad():
        for s, after in pairwise(sigmas):
            v = flows.guided(sd3, x, torch.full((1,), s), read(prompt), read(""), torch.full((1,), 3.0))
            x = x + (after - s) * v
    torch.testing.assert_close(theirs, x, atol=2e-4, rtol=1e-3)


def test_stable_diffusion_3_learns_with_text_encoders_that_stay(pooled, aligned, t5_words, corpus, tmp_path):
    text = flows.SD3Text(aligned, flows.pooling(pooled), t5.build(t5_words).requires_grad_(False))
    begun = flows.Flow(flows.build_sd3(), text, corpus.pairings)
    recipe = Recipe(steps=3, batch=8, lr=1e-3, warmup=1)
    taught = flows.train_flow("sd3", copy.deepcopy(begun), corpus, recipe, tmp_path, seed=0)
    before = begun.state_dict()
    changed = {name for name, value in taught.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"transformer", "cells"}
    assert "transformer.proj_out.weight" in changed


def test_guidance_is_taken_out_without_changing_what_is_computed(flux, corpus):
    plain = flows.without_guidance(flux, 3.5)
    assert not plain.transformer.config.guidance_embeds
    x, sigma = torch.randn(3, 16, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    hidden, pooled = torch.randn(3, 7, t5.WIDTH), torch.randn(3, clip.WIDTH)
    with torch.no_grad():
        told = flux.velocity(x, sigma, hidden, pooled, torch.full((3,), 3.5))
        torch.testing.assert_close(plain.velocity(x, sigma, hidden, pooled), told, atol=1e-4, rtol=1e-4)
        assert (told - flux.velocity(x, sigma, hidden, pooled)).abs().max() > 1e-3


def test_batches_fit_their_length_and_half_are_pairs(corpus):
    rng = np.random.default_rng(0)
    for length in (4, 16, 24, 32):
        batch = corpus.pick(32, rng, ((length, 1.0),))
        assert batch.t5_ids.shape == (32, length)
        assert batch.whole == (length > 4)
        if batch.whole:
            assert ((batch.t5_ids == 1).sum(1) == 1).all()  # every caption still has its end
        assert ((batch.labels[:16, :, 0] >= 0).sum(1) == 2).all()
        assert (batch.t5_ids[batch.dropped] == corpus.nothing[1][:length]).all()


def test_the_three_trainings_run_resume_and_leave_the_text_encoders_alone(flux, corpus, tmp_path, capsys):
    recipe = Recipe(steps=2, batch=8, lr=1e-3, warmup=1)
    read = copy.deepcopy(flux)
    flows.teach_text(read, corpus, recipe, tmp_path, seed=0)
    changed = {k for k, v in read.state_dict().items() if not torch.equal(v, flux.state_dict()[k])}
    assert {k.split(".")[0] for k in changed} == {"text", "reads"}
    assert all(k.startswith(("text.t5.", "reads.")) for k in changed)
    taught = flows.train_flow("flux", copy.deepcopy(flux), corpus, recipe, tmp_path, seed=0)
    assert not torch.equal(taught.text.t5.shared.weight, flux.text.t5.shared.weight)  # T5 learns here, and only here
    guided = flows.embed_guidance("guided", taught, corpus, recipe, tmp_path, seed=1)
    few = flows.shorten("few", guided, corpus, 3.0, recipe, tmp_path, seed=2)
    for flow in (guided, few):
        assert all(torch.equal(a, b) for a, b in zip(flow.text.state_dict().values(), taught.text.state_dict().values(),
                                                     strict=True))  # fmt: skip
        assert not torch.equal(flow.transformer.proj_out.weight, taught.transformer.proj_out.weight)
    flows.train_flow("flux", copy.deepcopy(flux), corpus, Recipe(steps=3, batch=8, lr=1e-3), tmp_path, seed=0)
    assert "[flux] resumed at step 2" in capsys.readouterr().out


def test_the_autoencoder_is_the_flow_models_format(tmp_path):
    vae = _lively(autoencoder16.build())
    pictures = np.stack([world.picture(i, "heldout") for i in range(12)])
    autoencoder16.normalise(vae, pictures)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert loaded.quant_conv is None
    assert loaded.post_quant_conv is None
    z = autoencoder16.encode_scaled(loaded, pictures)
    assert z.shape == (12, 16, 8, 8)
    assert abs(float(z.mean())) < 1e-4
    assert abs(float(z.std()) - 1) < 1e-4


def test_balancing_channels_changes_no_picture():
    vae = _lively(autoencoder16.build())
    with torch.no_grad():
        vae.encoder.conv_out.weight[2] *= 50
    pictures = np.stack([world.picture(i, "heldout") for i in range(12)])
    before = autoencoder.encode_all(vae, pictures)
    drawn = vae.decode(before).sample
    autoencoder16.balance(vae, pictures)
    after = autoencoder.encode_all(vae, pictures)
    torch.testing.assert_close(vae.decode(after).sample, drawn, atol=1e-4, rtol=1e-3)
    spread, was = after.std((0, 2, 3)), before.std((0, 2, 3))
    torch.testing.assert_close(spread, was.sqrt(), atol=1e-4, rtol=1e-3)


def test_a_folder_in_half_precision_is_loaded_and_judged(flux, pooled, words, t5_words, tmp_path):
    vae = _lively(autoencoder16.build())
    few = flows.without_guidance(flux, 3.0)
    made = assemble.flux(vae, pooled, words, flux.text.t5, t5_words, few.transformer)
    assemble.save(made, tmp_path / "flux-schnell")
    assert assemble.load("flux-schnell", tmp_path / "flux-schnell").scheduler.config.shift == 1.0
    lines = evaluate.judge_flow(tmp_path, "flux-schnell", oracle.Oracle.load(), count=2)
    assert [line.least for line in lines if line.least] == [34.0, 0.95, 0.95, 0.90, 0.85]
    assert all(line.short for line in lines if line.least)  # random weights draw nothing


def test_a_gpu_takes_larger_batches_and_fewer_steps():
    recipe = Recipe(steps=10, batch=64, lr=1e-3)
    assert recipe.on(torch.device("cpu")) == recipe
    assert recipe.on(torch.device("cuda")) == Recipe(steps=3, batch=512, lr=1e-3)


def test_halved_products_are_close_to_whole_ones_forwards_and_backwards():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8, bias=False))
    halved = copy.deepcopy(plain)
    halve_products([halved], torch.device("cpu"))
    x = torch.randn(5, 7, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    halved(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=0.05, rtol=0.05)
    for half, whole in zip(halved.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(half.grad, whole.grad, atol=0.3, rtol=0.05)
    again = copy.deepcopy(halved)  # an average of weights multiplies with its own
    with torch.no_grad():
        again[0].weight.zero_()
        again[0].bias.zero_()
        assert again(x).abs().max() == 0
        assert halved(x).abs().max() > 0
