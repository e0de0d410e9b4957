"""What is measured of new pictures, and which of a row's candidates is the best.

Legend: B pictures; E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.contract import Column, Row
from stages.engine.room import Rooms
from stages.models.clip import ImageEncoder, TextEncoder
from stages.ovi.scoring import clip_scores, open_oracle, oracle_scores
from stages.rare.candidates import Candidates
from stages.rare.settings import RareConceptsSettings

if TYPE_CHECKING:
    from PIL.Image import Image

SCORE_COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "text": (Column("clip_score", "float32", doc="100 max(cos(picture, prompt), 0)"),),
    "image": (Column("clip_image", "float32", doc="100 max(cos(picture, mean of the concept's pictures), 0)"),),
    "oracle": (
        Column("bound", "float32", doc="share of the asked objects that the oracle finds"),
        Column("success", "bool", doc="the oracle finds everything that was asked"),
    ),
}  # fmt: skip


class Judge:
    """Scores pictures by the job's measures; the encoders are loaded when they are first asked for.

    Args:
        settings: Which measures, by which models.
        device: Where the encoders run.
        rooms: Of the device.
    """

    def __init__(self, settings: RareConceptsSettings, device: torch.device, rooms: Rooms) -> None:
        self.scores, self._rooms = settings.scores, rooms
        self._clip, self._device = (settings.encoder, settings.encoder_revision), str(device)
        self._pickles = settings.allow_pickle
        self.oracle = None
        if "oracle" in self.scores:
            self.oracle = open_oracle(settings.oracle)

    @cached_property
    def images(self) -> ImageEncoder:
        """The image encoder that scores."""
        room = self._rooms["judged pictures"]
        return ImageEncoder(*self._clip, device=self._device, allow_pickle=self._pickles, room=room)

    @cached_property
    def texts(self) -> TextEncoder:
        """Its text encoder."""
        room = self._rooms["texts"]
        return TextEncoder(*self._clip, device=self._device, allow_pickle=self._pickles, room=room)

    def measure(self, pictures: Sequence[Image], owners: Sequence[Candidates]) -> list[Row]:
        """The measures of each picture, and the picture, as a row.

        Args:
            pictures: Drawn.
            owners: Whose candidate each of them is.
        """
        found: list[Row] = [
            {"image": picture} | {name: one.row.get(name) for name in ("objects", "relation", "count")}
            for picture, one in zip(pictures, owners, strict=True)
        ]
        if "text" in self.scores:
            found = self._against_prompts(found, [one.concept.prompt for one in owners])
        if "image" in self.scores:
            found = self._against_pictures(found, [one.centre_E for one in owners if one.centre_E is not None])
        return oracle_scores(found, self.oracle) if self.oracle is not None else found

    def _against_prompts(self, rows: list[Row], prompts: Sequence[str]) -> list[Row]:
        distinct = list(dict.fromkeys(prompts))
        texts = dict(zip(distinct, self.texts(distinct).numpy(), strict=True))
        return clip_scores([row | {"text": texts[own]} for row, own in zip(rows, prompts, strict=True)], self.images)

    def _against_pictures(self, rows: list[Row], centres: Sequence[torch.Tensor]) -> list[Row]:
        if "text" in self.scores:  # which has embedded them
            z_BE = torch.from_numpy(np.stack([row["picture_embedding"] for row in rows]))
        else:
            z_BE = self.images([row["image"] for row in rows])
        cosine_B = nn.functional.cosine_similarity(z_BE, torch.stack(list(centres)), dim=1).clamp_min(0)
        return [row | {"clip_image": 100 * float(cosine)} for row, cosine in zip(rows, cosine_B, strict=True)]

    def best(self, measured: Sequence[Row]) -> int:
        """The best of a row's candidates: by the first score, between equals by the next ones, then the first."""
        return max(range(len(measured)), key=lambda m: [value(measured[m], name) for name in self.scores])


def value(measured: Row, score: str) -> float:
    """What a score ranks by; the oracle's is 1 when all is found, and half the share of objects otherwise."""
    if score == "oracle":
        return (float(measured["bound"]) + float(measured["success"])) / 2
    return float(measured["clip_score" if score == "text" else "clip_image"])
