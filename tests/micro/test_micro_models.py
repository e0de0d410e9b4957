"""The shipped miniature models: formats, sizes, what they reach where it is cheap to see, errors that name folders."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from micro import MODELS, assemble, autoencoder, evaluate, oracle, prompts, train, training, world

FLOWS = ("flux", "flux-schnell", "sd3")
PHOTOGRAPHS = MODELS.parents[1] / "jobs/examples/quickstart/photographs"


@pytest.fixture(scope="module")
def stable():
    return assemble.load("stable-diffusion")


@pytest.fixture(scope="module")
def prior():
    return assemble.load("prior")


@pytest.fixture(scope="module")
def decoder():
    return assemble.load("decoder")


@pytest.fixture(scope="module")
def flux():
    return assemble.load("flux")


def test_the_folders_are_small_and_in_half_precision():
    from safetensors import safe_open

    files = list(MODELS.rglob("*.safetensors"))
    once = {hashlib.sha256(f.read_bytes()).digest(): (f.stat().st_size, f.relative_to(MODELS).parts[0] in FLOWS)
            for f in MODELS.rglob("*") if f.is_file()}  # fmt: skip
    assert sum(size for size, flow in once.values() if flow) < 40e6
    assert sum(size for size, flow in once.values() if not flow) < 40e6
    for path in files:
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path


def test_autoencoders_reach_thirty_decibels_and_share_a_latent_space(stable, decoder):
    pictures = np.stack([world.picture(i, "heldout") for i in range(40)])
    assert autoencoder.psnr_of(stable.vae, pictures) >= 30
    assert autoencoder.psnr_of(decoder.movq, pictures) >= 30
    scaled = autoencoder.encode_all(stable.vae, pictures) * stable.vae.config.scaling_factor
    assert torch.allclose(autoencoder.encode_all(decoder.movq, pictures), scaled, atol=0.05)


def test_the_flow_models_autoencoder_keeps_the_world_and_photographs_it_has_not_learned_from(flux):
    assert autoencoder.psnr_of(flux.vae, np.stack([world.picture(i, "heldout") for i in range(40)])) >= 33.5
    sides = [Image.open(PHOTOGRAPHS / f"{name}.jpg").resize((64, 64), Image.Resampling.LANCZOS)
             for name in ("camera", "rocket")]  # fmt: skip
    assert autoencoder.psnr_of(flux.vae, np.stack([np.asarray(side) for side in sides])) >= 26


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "least"),
    [("flux", 10, 3.5, 0.75), ("flux-schnell", 4, 0.0, 0.8), ("sd3", 20, 3.0, 0.8)],
)
def test_flow_models_draw_what_is_asked_in_diffusers(flux, name, steps, guidance, least):
    asked, pipeline = prompts.load("single")[:24], flux if name == "flux" else assemble.load(name)
    readings = oracle.Oracle.load().read(
        evaluate.draw_with_flow(pipeline, steps, guidance)([p.prompt for p in asked], 1)
    )
    first = [r.things[0] if r.things else None for r in readings]
    right = [thing is not None and (thing.color, thing.shape) == (p.objects[0]["color"], p.objects[0]["shape"])
             for thing, p in zip(first, asked, strict=True)]  # fmt: skip
    assert np.mean(right) >= least  # 24 pictures; micro/README.md has the figures of 300


def test_clip_retrieves_held_out_pictures(prior):
    lines = evaluate.judge_clip(prior.image_encoder, prior.text_encoder, prior.tokenizer, count=300)
    figures = {line.name: line.value for line in lines}
    assert figures["CLIP, full captions: text-to-image R@1 of 300"] >= 0.70
    assert figures["CLIP, full captions: gap"] > 0.3  # a modality gap, as real ones have


def test_stable_diffusion_draws_in_diffusers(stable):
    once = stable("a red star", num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(0)).images[0]
    again = stable("a red star", num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(0)).images[0]
    assert once.size == (64, 64)
    assert np.array_equal(np.asarray(once), np.asarray(again))


def test_kandinsky_draws_in_diffusers(prior, decoder):
    embeds = prior("a red star", num_inference_steps=2, generator=torch.manual_seed(0))
    assert embeds.image_embeds.shape == (1, prior.image_encoder.config.projection_dim)
    drawn = decoder(image_embeds=embeds.image_embeds, negative_image_embeds=embeds.negative_image_embeds, height=64,
                    width=64, num_inference_steps=2, generator=torch.manual_seed(0)).images[0]  # fmt: skip
    assert drawn.size == (64, 64)


def test_tokens_can_be_added(stable):
    assert stable.tokenizer.add_tokens(["<frozen>"]) == 1
    assert "<frozen>" in stable.tokenizer.tokenize("a <frozen> star")


def test_missing_truncated_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: no StableDiffusionPipeline .* no model_index.json"):
        assemble.load("stable-diffusion", tmp_path)
    with pytest.raises(OSError, match="it holds a StableDiffusionPipeline"):
        assemble.load("decoder", MODELS / "stable-diffusion")
    cut = tmp_path / "cut"
    shutil.copytree(MODELS / "stable-diffusion", cut)
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"{cut}: no StableDiffusionPipeline .* missing or truncated"):
        assemble.load("stable-diffusion", cut)
    (cut / "model_index.json").write_text("{")
    with pytest.raises(OSError, match="not valid JSON"):
        assemble.load("stable-diffusion", cut)


def test_evaluate_says_in_one_line_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", "--models", str(tmp_path)])
    assert evaluate.main() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message


def test_the_card_takes_the_table_and_keeps_the_rest(tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    card.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    monkeypatch.setattr(evaluate, "CARD", card)
    lines = [evaluate.Line("a", 0.5, 0.75), evaluate.Line("b", 1.0, 0.75), evaluate.Line("c", 2.0)]
    evaluate.write_card(lines, count=7)
    text = card.read_text()
    assert text.startswith("before\n<!-- figures -->\n`python -m micro.evaluate --count 7 --card`")
    assert text.endswith("<!-- end of figures -->\nafter\n")
    assert "old" not in text
    assert [line for line in text.splitlines() if line[:4] in ("| a ", "| b ", "| c ")] == [
        "| a | 0.500 | 0.75 | **no**, 0.25 short |", "| b | 1.000 | 0.75 | yes |", "| c | 2.000 |  |  |"
    ]  # fmt: skip


def test_one_model_judged_anew_leaves_the_others_figures(tmp_path, monkeypatch, capsys):
    card = tmp_path / "README.md"
    card.write_text("<!-- figures -->\n<!-- end of figures -->\n")
    old = [{"name": name, "value": 0.5, "least": 0.75} for name in ("FLUX: a", "FLUX, b", "FLUX in four steps: a")]
    (tmp_path / "metrics.json").write_text(json.dumps(old))
    monkeypatch.setattr(evaluate, "CARD", card)
    monkeypatch.setattr(evaluate.oracle.Oracle, "load", lambda folder: None)
    new = [evaluate.Line("FLUX: a", 0.8, 0.75), evaluate.Line("FLUX, b", 0.9, 0.75)]
    monkeypatch.setattr(evaluate, "judge_flow", lambda folder, name, judge, count: new)
    monkeypatch.setattr("sys.argv", ["evaluate", "--models", str(tmp_path), "--only", "flux", "--card"])
    assert evaluate.main() == 0
    capsys.readouterr()
    assert [line["value"] for line in json.loads((tmp_path / "metrics.json").read_text())] == [0.8, 0.9, 0.5]
    assert card.read_text().count("| yes |") == 2


def test_movq_grown_from_a_vae_computes_what_the_vae_computes():
    torch.manual_seed(0)
    vae = autoencoder.build_vae().eval()
    vae.register_to_config(scaling_factor=0.7)
    movq = autoencoder.grow_movq(vae).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mean
        z = movq.encode(x).latents
        assert torch.allclose(z, mean * 0.7, atol=1e-5)
        assert torch.allclose(movq.decode(z, force_not_quantize=True).sample, vae.decode(mean).sample, atol=1e-4)


def test_a_stopped_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))

    def trained(work, steps):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 1)
        recipe = training.Recipe(steps=8, batch=16, lr=1e-2, warmup=2)
        seen = 0

        def loss_of(rows, rng):
            nonlocal seen
            seen += 1
            if seen > steps:
                raise KeyboardInterrupt
            return (module(x[rows]) - x[rows].sum(1, keepdim=True)).square().mean()

        return training.train("line", module, loss_of, 64, recipe, work).state_dict()

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = trained(tmp_path / "whole", 8)
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))  # every step is old enough for a checkpoint
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 3)
    resumed = trained(tmp_path / "cut", 8)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_shipped_figures_are_written_beside_the_weights():
    figures = {line["name"]: line for line in json.loads((MODELS / "metrics.json").read_text())}
    for name in ("VAE reconstruction, dB PSNR", "oracle, held-out: color"):
        assert figures[name]["value"] >= figures[name]["least"]


def test_minutes_are_shared_out_among_all_models_or_spent_on_the_only_one():
    everything = train.bounded(100, None)
    assert sum(r.minutes for r in everything.values()) == pytest.approx(100)
    assert set(everything) == set(train.RECIPES)
    for stage in train.STAGES:
        own = train.bounded(60, stage)
        assert sum(r.minutes for r in own.values()) == pytest.approx(60)
        assert all(r.minutes == 0 for r in train.bounded(None, stage).values())
    assert set(train.bounded(60, "flux")) == {"t5", "flux", "flux-guidance"}
    assert {name for stage in train.STAGES for name in train.bounded(None, stage)} == set(train.RECIPES)
