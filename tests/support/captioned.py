"""A reference of captioned pictures that nobody drew: embeddings that follow from hidden numbers, as their texts do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from index import captions, joint, neighbours
from tests.support.tiny_kandinsky import WIDTH, build_reference

HIDDEN = 6


def build_captioned(folder: Path, prior: str, texts: int, rows: int = 300, seed: int = 0) -> str:
    """`build_reference`, whose first ``texts`` rows get text embeddings; returns the output that it lies in."""
    from stages.models import clip

    output = build_reference(folder, prior, rows, seed)
    reference = Path(output) / "reference"
    rng = np.random.default_rng(seed + 1)
    rows_M = np.sort(rng.permutation(rows)[:texts])
    z_ME = np.load(reference / "vectors.npy")[rows_M]
    mixed_MT = z_ME @ rng.normal(size=(WIDTH, HIDDEN)) @ rng.normal(size=(HIDDEN, WIDTH)) / 8
    t_MT = (mixed_MT + 0.3 * rng.normal(size=mixed_MT.shape) + 2).astype(np.float32)
    sums = joint.Accumulator(WIDTH, WIDTH)
    sums.add(t_MT, z_ME)
    told = captions.build(
        reference, {"dtype": "float32"}, neighbours.Plan(), lambda: [captions.Texts(rows_M, t_MT)], sums.pairs()
    )  # fmt: skip
    facts = json.loads((reference / "reference.json").read_text())
    facts |= {"captions": {"captioned": told["captioned"]}, "text_encoder": clip.identity(prior, "text")}
    (reference / "reference.json").write_text(json.dumps(facts))
    return output
