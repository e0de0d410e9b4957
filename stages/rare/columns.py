"""The columns of a new picture: declared, and filled, in one place."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.contract import Column, Row
from stages.concepts.samples import sheet
from stages.inversion.metrics import noise_statistics
from stages.inversion.stage import NOISE_STATISTICS
from stages.models.captions import TOKEN_COLUMNS
from stages.rare.candidates import Candidates
from stages.rare.guides import uses_anchor
from stages.rare.references import References
from stages.rare.scores import SCORE_COLUMNS, value
from stages.rare.settings import NaoMethod, NoiseMethod, RareConceptsSettings, SeedSelectMethod

THUMBNAIL = 128
"""Pixels of a concept's picture on the sheet that is kept of them."""


def columns(settings: RareConceptsSettings, latent_shape: tuple[int, int, int]) -> tuple[Column, ...]:
    """All of them."""
    selected = [
        Column("select_start", "float32", doc="loss of the seed before it was optimised"),
        Column("select_loss", "float32", doc="the same before the last update"),
    ]
    found = [
        Column("anchor_distance", "float32", doc="1 - cosine of its text embedding to the prompt's"),
        Column("anchor_count", "int64", doc="rows of the reference that have it as their caption"),
    ]
    guided = [
        Column("guide", "string", doc="by which the picture was drawn; plain: by the prompt alone"),
        Column("anchor", "string", doc="the text that r2f and aapb drew it by, beside the prompt"),
    ]
    return (
        Column("concept", "string"),
        Column("prompt", "string"),
        *TOKEN_COLUMNS,
        Column("method", "string"),
        *(guided if settings.guides else []),
        *(found if settings.anchors else []),
        Column("number", "int64", doc="of the row among those of its concept, method and guide"),
        Column("candidate", "int64", doc="which of the row's candidates was kept"),
        Column("job_seed", "int64", doc="the job's `seed`: with it, concept, number and candidate noise is drawn"),
        Column("image", "image"),
        Column("latent", "tensor", latent_shape, settings.store, doc="z_T: the seed that draws the picture"),
        Column("parents", "json", doc="the concept's own seeds: id, weight in this one, dB regenerated"),
        Column("score", "float32", doc=f"what candidates were ranked by: {settings.scores[0]}"),
        *(column for name in settings.scores for column in SCORE_COLUMNS[name]),
        Column("candidate_scores", "tensor", (settings.candidates,), doc="score of every candidate, the kept one too"),
        *(Column(name, "float32", doc="of the seed; a Gaussian one has 0, 1, 0, 0") for name in NOISE_STATISTICS),
        *(selected if any(isinstance(method, SeedSelectMethod) for method in settings.methods) else []),
        Column("references", "image", doc="the concept's pictures, on its first row by each method"),
    )


def filled(one: Candidates, measured: Sequence[Row], best: int, settings: RareConceptsSettings) -> Row:
    """What is known of a row when its candidates are drawn.

    Args:
        one: The row and its candidates.
        measured: Picture and measures of each candidate.
        best: The one that is kept.
        settings: The stage's.
    """
    z_CHW, kept, first = one.z_MCHW[best], measured[best], settings.scores[0]
    made: Row = {
        "concept": one.concept.name,
        "prompt": one.concept.prompt,
        "method": one.method.label,
        "number": int(one.number),
        "candidate": best,
        "job_seed": settings.seed,
        "image": kept["image"],
        "latent": z_CHW.numpy().astype(settings.store),
        "parents": _parents(one.method, one.concept, one.weight_MK[best]),
        "score": value(kept, first),
        "candidate_scores": np.array([value(row, first) for row in measured], dtype=np.float32),
        **{name: values[0] for name, values in noise_statistics(z_CHW[None]).items()},
        **{column.name: kept[column.name] for name in settings.scores for column in SCORE_COLUMNS[name]},
    }
    if settings.guides:
        made |= {"guide": one.guide.label, "anchor": one.texts.anchor if uses_anchor(one.guide) else None}
    if isinstance(one.method, SeedSelectMethod):
        start, end = one.losses_M2[best].tolist()
        made |= {"select_start": start, "select_loss": end}
    first_guide = settings.guides is None or one.guide.label == settings.guides[0].label
    if one.number == "0" and first_guide and one.concept.pictures:
        made["references"] = sheet([
            picture.resize((THUMBNAIL, THUMBNAIL)) if picture.width > THUMBNAIL else picture
            for picture in one.concept.pictures
        ])  # fmt: skip
    return made


def _parents(method: NoiseMethod, concept: References, weight_K: torch.Tensor) -> str:
    """The pictures that a latent comes from, with their weights: all of them where their centroid is in it."""
    through_centroid = isinstance(method, NaoMethod | SeedSelectMethod)
    return json.dumps([
        {"id": own, "weight": round(float(weight), 4), "psnr": None if psnr is None else round(psnr, 2)}
        for own, weight, psnr in zip(concept.ids, weight_K, concept.psnr, strict=True)
        if through_centroid or float(weight) > 0
    ])  # fmt: skip
