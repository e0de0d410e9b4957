"""Candidate pictures to embeddings, each with the picture of a reference that it is nearest to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from index.reference import Reference, find, require_encoder
from pipeline.contract import Column, Row, StageInfo
from stages.embed.stage import Embed
from stages.models.clip import identity
from stages.selection.settings import EmbedCandidatesSettings

COLUMNS = (
    Column("nearest", "string", doc="id of the nearest picture of `against`"),
    Column("nearest_cosine", "float32", doc="cosine to it"),
)


class EmbedCandidates:
    """Rows with a picture in ``image`` to its ``embedding`` and, with `against`, the nearest picture there.

    Raises:
        FileNotFoundError, ReferenceMismatch: `against` is no finished reference, or one by another encoder.
    """

    Settings = EmbedCandidatesSettings

    def __init__(self, settings: EmbedCandidatesSettings) -> None:
        self._embed = Embed(settings)
        self.rooms = self._embed.rooms
        self._reference: Reference | None = None
        if settings.against is not None:
            pickles = settings.allow_pickle
            encoder = identity(settings.encoder, "image", settings.revision, allow_pickle=pickles)
            self._reference = Reference.open(settings.against, encoder=encoder)

    @staticmethod
    def describe(settings: EmbedCandidatesSettings) -> StageInfo:
        info = replace(Embed.describe(settings), bodily=("image",))
        if settings.against is None:
            return info
        told = (find(settings.against) / "reference.json").read_bytes()
        require_encoder(find(settings.against), json.loads(told)["encoder"], info.models["image_encoder"])
        digest = hashlib.blake2b(told, digest_size=16).hexdigest()
        models = {**info.models, "against": {"path": settings.against, "revision": "", "fingerprint": digest}}
        return replace(info, columns=(*info.columns, *COLUMNS), models=models)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in self._embed(rows):
            yield row if self._reference is None or row["status"] != "ok" else self._compared(self._reference, row)

    @staticmethod
    def _compared(reference: Reference, row: Row) -> Row:
        found = reference.neighbours(torch.from_numpy(row["embedding"])[None].float(), 1)
        return {**row, "nearest": str(found.ids[0, 0]), "nearest_cosine": float(found.cos_BK[0, 0])}
