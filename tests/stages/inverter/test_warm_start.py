"""A start for words near what pictures invert to."""

from __future__ import annotations

import json

import numpy as np

from stages.concepts.prepare import prepare
from stages.concepts.settings import LegoSettings, Templates
from stages.inverter.model import InverterShape, TextInverter
from stages.inverter.warm_start import warm_start
from stages.models.words import encode
from tests.stages.inverter.test_training import SMALL
from tests.support.concepts import concept_row, stage_of


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
