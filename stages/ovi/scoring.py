"""How well pictures and embeddings fulfil their prompts.

CLIP score and distances in CLIP space are judged by the encoder that made the embeddings; the oracle of the miniature
world shares nothing with it.

Legend: B rows, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.contract import Row
from pipeline.extras import miniature
from stages.models.copies import here

if TYPE_CHECKING:
    from index.gaussian import Gaussian, Moments
    from index.reference import Reference
    from micro.oracle import Oracle
    from stages.models.clip import ImageEncoder


ASKED = ("objects", "relation", "count")
"""Columns of the miniature prompt sets that say what a picture must show."""


def embedding_measures(rows: list[Row], reference: Reference | None) -> list[Row]:
    """Adds `norm` and `text_cosine`, and against a reference `mahalanobis` (squared, over E) and the nearest image.

    `nearest_cosine` near 1 means that the embedding is a copy of a picture of the reference, `nearest_id`.
    """
    if not rows:
        return []
    z_BE = torch.from_numpy(np.stack([row["embedding"] for row in rows])).float()
    t_BE = torch.from_numpy(np.stack([row["text"] for row in rows])).float()
    cosine_B = nn.functional.cosine_similarity(z_BE, t_BE, dim=-1).tolist()
    norm_B = z_BE.norm(dim=-1).tolist()
    measured = [{"norm": n, "text_cosine": c} for n, c in zip(norm_B, cosine_B, strict=True)]
    if reference is not None:
        distance_B = (reference.mahalanobis(z_BE.double()) / z_BE.shape[1]).tolist()
        near = reference.neighbours(z_BE, 1)
        for i, found in enumerate(measured):
            found |= {
                "mahalanobis": distance_B[i],
                "nearest_cosine": float(near.cos_BK[i, 0]),
                "nearest_id": str(near.ids[i, 0]),
            }
    return [{**row, **found} for row, found in zip(rows, measured, strict=True)]


def clip_scores(rows: list[Row], encoder: ImageEncoder) -> list[Row]:
    """Adds `clip_score`, 100 max(cos(picture, prompt), 0) (Hessel et al., 2021, without their factor 2.5), and the
    picture's own embedding as `picture_embedding`."""
    if not rows:
        return []
    z_BE = encoder([row["image"] for row in rows])
    t_BE = torch.from_numpy(np.stack([row["text"] for row in rows])).float()
    score_B = (100 * nn.functional.cosine_similarity(z_BE, t_BE, dim=-1).clamp_min(0)).tolist()
    return [
        {**row, "clip_score": score, "picture_embedding": z_E.numpy()}
        for row, score, z_E in zip(rows, score_B, z_BE, strict=True)
    ]


def asked_of(row: Row) -> dict[str, Any] | None:
    """What a prompt of the miniature world asks for (`ASKED`).

    None where the row does not say.

    Raises:
        ValueError: The column `objects` is no list of attributes.
    """
    objects = row.get("objects")
    if objects is None:
        return None
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except ValueError:
            raise ValueError("column 'objects' is not JSON") from None
    if not isinstance(objects, Iterable) or not all(isinstance(asked, dict) for asked in objects):
        raise ValueError("column 'objects' is no list of attributes")
    known = [{name: value for name, value in asked.items() if value is not None} for asked in objects]
    return {"objects": known, "relation": row.get("relation"), "count": row.get("count")}


def open_oracle(folder: str | None) -> Oracle:
    """The oracle in a folder; None: the shipped one.

    Raises:
        MissingExtra: The miniature world, which it judges by, is not installed.
    """
    with miniature():
        from micro.oracle import Oracle

    return Oracle.load(here(folder)) if folder else Oracle.load()


def oracle_scores(rows: list[Row], oracle: Oracle) -> list[Row]:
    """Adds `bound` (share of the asked objects found with all their attributes) and `success`; null where nothing is
    asked."""
    from micro.oracle import score

    readings = oracle.read([row["image"] for row in rows]) if rows else []
    scored = []
    for row, reading in zip(rows, readings, strict=True):
        asked = asked_of(row)
        if asked is None:
            scored.append(row)
            continue
        found = score(reading, asked["objects"], asked["relation"], asked["count"])
        scored.append({**row, "bound": float(found.bound), "success": bool(found.success)})
    return scored


def frechet(statistics: Moments, gaussian: Gaussian) -> float | None:
    """Squared Frechet distance of some embeddings' Gaussian to the reference's; None where they are too few, or too
    much alike, to have one (of two embeddings the shrinkage is 0, and the covariance singular).

    Covariances of few rows are shrunk (Ledoit-Wolf), so the distance of a small sample is biased: compare only samples
    of one size.
    """
    from index.gaussian import fit

    if statistics.rows < 2:
        return None
    try:
        return fit(statistics).frechet(gaussian)
    except ValueError:
        return None
