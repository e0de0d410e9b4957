"""A start for words near what pictures invert to."""

from __future__ import annotations

import json

import numpy as np
import torch

from stages.concepts.prepare import prepare
from stages.concepts.settings import LegoSettings, Templates
from stages.inverter import warm_start as module
from stages.inverter.model import InverterShape, TextInverter
from stages.inverter.warm_start import warm_start
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from stages.models.words import encode
from tests.stages.inverter.test_training import SMALL
from tests.support.concepts import concept_row, stage_of
from tests.support.tiny_stable_diffusion import build


def test_warm_start_brings_prompts_near_the_inverted_latents(folder, model, tmp_path):
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL)).eval().requires_grad_(False)
    prepared = prepare(concept_row(0), model, LegoSettings(), Templates(), max_words=4, root="")
    encoders = model.text_encoders
    z_ICHW, ids, which = prepared.as_they_are()

    def distance(v):
        text, _ = encode(encoders, ids, which, v.expand(len(z_ICHW), -1, -1))
        return (text - inverter(z_ICHW)[0]).square().mean().item()

    moved = warm_start(encoders, inverter, z_ICHW, ids, which, prepared.start_VE, steps=30, lr=1e-2)
    assert distance(moved) < distance(prepared.start_VE)
    inverter.save(str(tmp_path))
    options = {"settings": {"steps": 2, "window": 2}, "slots": 1}
    (cold,) = stage_of(folder, **options)([concept_row(0)])
    (warm,) = stage_of(folder, inverter=str(tmp_path), **options)([concept_row(0)])
    assert json.loads(warm["curve"])[0]["norms"] != json.loads(cold["curve"])[0]["norms"]
    assert np.abs(warm["embeddings"] - cold["embeddings"]).max() > 5e-3


def test_float16_keeps_the_gradient_near_the_aim(model, tmp_path, monkeypatch):
    """Latents in units of a large deviation make the gradient as small as a mean of 77 x 768 numbers near its aim."""
    half = open_latent_model(LatentModelSettings(model=build(tmp_path), device="cpu", dtype="float16"))
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL)).eval().requires_grad_(False)
    inverter.std_TK.fill_(200.0)
    prepared = prepare(concept_row(0), model, LegoSettings(), Templates(), max_words=4, root="")

    z_ICHW, ids, which = prepared.as_they_are()

    def gradient(of) -> torch.Tensor:
        seen = []
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(self.param_groups[0]["params"][0].grad))
        warm_start(of.text_encoders, inverter, z_ICHW, ids, which, prepared.start_VE, steps=1, lr=1e-2)
        return seen[0].flatten().double()

    reference, scaled = gradient(model), gradient(half)
    assert torch.nn.functional.cosine_similarity(scaled, reference, dim=0) > 0.999
    monkeypatch.setattr(module, "loss_scale", lambda dtypes: None)
    assert torch.nn.functional.cosine_similarity(gradient(half), reference, dim=0) < 0.999
