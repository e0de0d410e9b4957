"""The latent inversion module: shapes, training that resumes, its use as a stage and as a start for words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stages.concepts.prepare import prepare
from stages.concepts.settings import LegoSettings, Templates
from stages.engine.checkpoint import read_checkpoint
from stages.inverter.model import InverterShape, TextInverter
from stages.inverter.settings import DrawPairsSettings, InvertTextSettings, Training
from stages.inverter.stage import DrawPairs, InvertText
from stages.inverter.training import Pairs, split, text_conditions, train_inverter
from stages.inverter.warm_start import warm_start
from stages.models.words import encode
from tests.stages.concepts.test_lego import concept_row, opened, stage_of
from tests.support.tiny_stable_diffusion import WORDS, build

SMALL = {"latent": (4, 8, 8), "patch": 4, "width": 32, "layers": 2, "heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture(scope="module")
def model(folder):
    return opened(folder)


def pairs(count: int = 24) -> Pairs:
    """Prompts of two words and latents that give the words away."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (2, count))
    z = rng.normal(0, 0.1, (count, 4, 8, 8)).astype(np.float16)
    for i in range(count):
        z[i, first[i]] += 2
        z[i, second[i], :, 4:] -= 3
    names = [w for w in WORDS if len(w) > 3]
    return Pairs(z, [f"{names[a]} {names[b + 4]}" for a, b in zip(first, second, strict=True)])


def test_inverter_learns_and_beats_the_mean_latent(model):
    settings = Training(steps=100, batch=8, lr=3e-3, noise_rows=2, held_out=0.2)
    shape = InverterShape(text=(16, 32), **SMALL)
    inverter, measures = train_inverter(model, pairs(40), shape, settings, seed=0)
    assert measures["held_out"] == 8
    assert measures["mse"] < 0.6 * measures["mean_latent_mse"]
    assert measures["cosine"] > 0.6
    # The reported error is the plain one.
    data = pairs(40)
    held = split(40, 0.2, 0)[1]
    text, _ = text_conditions(model, [data.prompts[i] for i in held])
    guess, _ = inverter(torch.from_numpy(data.z_MCHW[held]).float())
    assert measures["mse"] == pytest.approx((guess - text).square().mean().item(), rel=1e-4)


def test_training_killed_and_resumed_ends_equal(model, tmp_path):
    shape = InverterShape(text=(16, 32), **SMALL)
    path = str(tmp_path / "c.safetensors")

    def trained(steps_seen=None, **options):
        settings = Training(steps=12, batch=4, noise_rows=2)
        return train_inverter(model, pairs(), shape, settings, seed=1, **options)

    whole, _ = trained()

    class Killed(Exception):
        pass

    def die(line: str) -> None:
        if "step 7 " in line:
            raise Killed

    with pytest.raises(Killed):
        trained(checkpoint=path, checkpoint_seconds=-1.0, report=die)
    assert read_checkpoint(path)[1]["step"] == 6
    resumed, measures = trained(checkpoint=path, checkpoint_seconds=-1.0)
    assert [point["step"] for point in measures["curve"]] == list(range(1, 13))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, resumed.state_dict()[name], atol=1e-6), name


def test_sdxl_inverters_give_the_pooled_condition_too(tmp_path):
    model = opened(build(tmp_path, "sdxl"))
    shape = InverterShape(text=(16, 56), pooled=20, **SMALL)
    settings = Training(steps=3, batch=4, noise_rows=2)
    inverter, _ = train_inverter(model, pairs(), shape, settings, seed=0)
    text, pooled = inverter(torch.zeros(2, 4, 8, 8))
    assert text.shape == (2, 16, 56)
    assert pooled.shape == (2, 20)


def test_saved_inverters_load_from_their_folder_or_the_jobs(tmp_path):
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL))
    inverter.save(str(tmp_path / "out" / "inverter"))
    z = torch.randn(1, 4, 8, 8)
    for place in ("out", "out/inverter"):
        assert torch.allclose(TextInverter.load(str(tmp_path / place))(z)[0], inverter.eval()(z)[0], atol=1e-6)
    with pytest.raises(ValueError, match="run a train-inverter job"):
        TextInverter.load(str(tmp_path))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        InverterShape(latent=(4, 9, 8), text=(16, 32))
    with pytest.raises(ValueError, match="no multiple of heads"):
        InverterShape(latent=(4, 8, 8), text=(16, 32), width=30, heads=4)
    with pytest.raises(ValueError, match="too few"):
        split(1, 0.05, 0)


def test_pictures_are_drawn_from_seed_and_id_and_latents_are_theirs(folder, model):
    rows = [{"id": str(i), "prompt": p} for i, p in enumerate(("red star", "", "blue heart", "red star"))]
    rows[1]["prompt"] = None
    settings = DrawPairsSettings(model=folder, steps=2, guidance=3.0, batch=2, device="cpu", seed=4)
    drawn = {row["id"]: row for row in DrawPairs(settings)(rows)}
    assert drawn["1"]["status"] == "failed"
    assert "prompt is empty" in drawn["1"]["error"]
    alone = next(iter(DrawPairs(settings.model_copy(update={"batch": 1}))([dict(rows[3])])))
    assert np.abs(alone["latent"] - drawn["3"]["latent"]).max() < 1e-4
    assert np.abs(drawn["0"]["latent"] - drawn["3"]["latent"]).max() > 1e-2  # the same prompt, another id
    pixels = torch.from_numpy(np.array(drawn["0"]["image"])).float().permute(2, 0, 1)[None] / 127.5 - 1
    expected = model.pipeline.vae.encode(pixels).latent_dist.mean * model.pipeline.vae.config.scaling_factor
    assert np.abs(expected[0].numpy() - drawn["0"]["latent"]).max() < 1e-5


def test_pictures_to_text_latents(folder, tmp_path):
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL))
    inverter.save(str(tmp_path))
    settings = InvertTextSettings(inverter=str(tmp_path), model=folder, device="cpu", batch=2)
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


def test_warm_start_brings_prompts_near_the_inverted_latents(folder, model, tmp_path):
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL)).eval().requires_grad_(False)
    prepared = prepare(concept_row(0), model, LegoSettings(), Templates(), max_words=4, root="")
    encoders = model.text_encoders
    ids, which = prepared.ids_EIT, prepared.which_EIT

    def distance(v):
        text, _ = encode(encoders, ids, which, v.expand(len(prepared.z_ICHW), -1, -1))
        return (text - inverter(prepared.z_ICHW)[0]).square().mean().item()

    moved = warm_start(encoders, inverter, prepared.z_ICHW, ids, which, prepared.start_VE, steps=30, lr=1e-2)
    assert distance(moved) < distance(prepared.start_VE)
    inverter.save(str(tmp_path))
    options = {"settings": {"steps": 2, "window": 2}, "slots": 1}
    (cold,) = stage_of(folder, **options)([concept_row(0)])
    (warm,) = stage_of(folder, inverter=str(tmp_path), **options)([concept_row(0)])
    assert json.loads(warm["curve"])[0]["norms"] != json.loads(cold["curve"])[0]["norms"]
    assert np.abs(warm["embeddings"] - cold["embeddings"]).max() > 5e-3
