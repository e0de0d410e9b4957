"""Training of an inverter: it learns, and a killed training resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.engine.checkpoint import read_checkpoint
from stages.inverter import training
from stages.inverter.model import InverterShape
from stages.inverter.settings import Training
from stages.inverter.training import Pairs, split, text_conditions, train_inverter
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.support.concepts import opened
from tests.support.tiny_stable_diffusion import WORDS, build

SMALL = {"latent": (4, 8, 8), "patch": 4, "width": 32, "layers": 2, "heads": 4}


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
    settings = Training(steps=100, batch_size=8, lr=3e-3, noise_rows=2, held_out=0.2)
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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.filterwarnings("error:Detected call of")
def test_training_killed_and_resumed_ends_equal(dtype, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """In float16 from a scale at which the first steps overflow, so that it is not the first one any more."""
    monkeypatch.setattr(training, "loss_scale", lambda dtypes: 2.0**28 if dtype == "float16" else None)
    model = open_latent_model(LatentModelSettings(model=build(tmp_path / "model"), device="cpu", dtype=dtype))
    shape = InverterShape(text=(16, 32), **SMALL)
    path = str(tmp_path / "c.safetensors")

    def trained(steps_seen=None, **options):
        settings = Training(steps=12, batch_size=4, noise_rows=2)
        return train_inverter(model, pairs(), shape, settings, seed=1, **options)

    whole, _ = trained()

    class Killed(Exception):
        pass

    def die(line: str) -> None:
        if "step 7 " in line:
            raise Killed

    with pytest.raises(Killed):
        trained(checkpoint=path, checkpoint_seconds=-1.0, report=die)
    meta = read_checkpoint(path)[1]
    assert meta["step"] == 6
    if dtype == "float16":
        assert 1 < meta["scaler"]["scale"] < 2.0**28
    resumed, measures = trained(checkpoint=path, checkpoint_seconds=-1.0)
    assert [point["step"] for point in measures["curve"]] == list(range(1, 13))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, resumed.state_dict()[name], atol=1e-6), name


def test_float16_keeps_the_gradient_of_a_real_latents_mean(model, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Of the noise-prediction loss alone, a small part of the whole; a weight makes it as small as the mean over a real
    latent and sixteen pictures makes it."""
    half = open_latent_model(LatentModelSettings(model=build(tmp_path), device="cpu", dtype="float16"))
    monkeypatch.setattr(training, "_standard_error", lambda inverter, guess, *_: 0.0 * guess.sum())
    shape = InverterShape(text=(16, 32), **SMALL)

    def gradient(of) -> torch.Tensor:
        seen = []

        def kept(parameters, limit):
            seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).double())

        monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", kept)
        settings = Training(steps=1, batch_size=4, noise_rows=4, noise_weight=1e-4)
        train_inverter(of, pairs(), shape, settings, seed=1)
        return seen[0]

    reference, scaled = gradient(model), gradient(half)
    assert torch.nn.functional.cosine_similarity(scaled, reference, dim=0) > 0.999
    assert float(scaled.norm() / reference.norm()) == pytest.approx(1, abs=0.02)  # unscaled before it is clipped
    monkeypatch.setattr(training, "loss_scale", lambda dtypes: None)
    assert torch.nn.functional.cosine_similarity(gradient(half), reference, dim=0) < 0.99


def test_a_batch_may_be_smaller_than_the_rows_of_the_noise_loss(model):
    shape = InverterShape(text=(16, 32), **SMALL)
    curves = [
        train_inverter(model, pairs(), shape, Training(steps=2, batch_size=4, noise_rows=rows), seed=1)[1]["curve"]
        for rows in (4, 16)
    ]
    assert curves[0] == curves[1]


def test_sdxl_inverters_give_the_pooled_condition_too(tmp_path):
    model = opened(build(tmp_path, "sdxl"))
    shape = InverterShape(text=(16, 56), pooled=20, **SMALL)
    settings = Training(steps=3, batch_size=4, noise_rows=2)
    inverter, _ = train_inverter(model, pairs(), shape, settings, seed=0)
    text, pooled = inverter(torch.zeros(2, 4, 8, 8))
    assert text.shape == (2, 16, 56)
    assert pooled.shape == (2, 20)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pictures_are_refused_instead_of_training_on_nothing(count: int) -> None:
    with pytest.raises(ValueError, match="too few to train on: at least 2 beside the 1 held out"):
        split(count, 0.1, seed=0)
    trained, held = split(3, 0.1, seed=0)
    assert (len(trained), len(held)) == (2, 1)
