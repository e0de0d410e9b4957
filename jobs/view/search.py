"""Rows of a reference nearest to a text, a picture or an embedding that the page shows."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.view.query import BadRequest, find
from jobs.view.run import Place, Run

if TYPE_CHECKING:
    import torch

    from index.reference import Reference

LONGEST_TEXT, HITS = 2000, 48


@dataclass
class Searcher:
    """A run's own reference. Index and encoders are opened at the first search; one search runs at a time."""

    run: Run
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _encoders: dict[str, Any] = field(default_factory=dict)
    _reference: Reference | None = None

    def text(self, text: str) -> list[tuple[Place, float]]:
        """Nearest to a text, best first, with cosines.

        Raises:
            BadRequest: The text is empty or long.
            ValueError: The reference has no text encoder, or it has changed.
        """
        if not 0 < len(text.strip()) <= LONGEST_TEXT:
            raise BadRequest(f"search for a text of 1 to {LONGEST_TEXT:,} characters")
        with self._turn:
            return self._nearest(self._encoder("text")([text]))

    def cell(self, run: Run, place: Place, name: str) -> list[tuple[Place, float]]:
        """Nearest to a picture or an embedding of a row, of this run or another.

        Raises:
            BadRequest: The cell is empty, or holds neither.
            ValueError: It was made with another encoder.
        """
        column = find(run.columns, name)
        if column.kind not in ("image", "vector"):
            raise BadRequest(f"column {name!r} ({column.kind}) cannot be searched for")
        value = run.cell(place, name, "bytes" if column.kind == "image" else None)
        if value is None:
            raise BadRequest(f"row {place} has no {name!r}")
        with self._turn:
            return self._nearest(self._of_picture(value) if column.kind == "image" else self._of_vector(run, value))

    def _opened(self) -> Reference:
        if self._reference is None:
            from index.reference import Reference

            self._reference = Reference.open(self.run.output.path)
        return self._reference

    def _encoder(self, role: str) -> Any:
        from jobs.page.queries import encoder

        if role not in self._encoders:
            self._encoders[role] = encoder(self._opened(), "text" if role == "text" else "image")
        return self._encoders[role]

    def _of_picture(self, data: bytes) -> torch.Tensor:
        from jobs.view.pictures import MAX_PIXELS
        from pipeline.pictures import PictureError, decode_picture

        try:
            picture = decode_picture(data, MAX_PIXELS)
        except PictureError as error:
            raise BadRequest(f"the picture cannot be searched for: {error}") from None
        embedding: torch.Tensor = self._encoder("image")([picture])
        return embedding

    def _of_vector(self, run: Run, value: list[float]) -> torch.Tensor:
        import torch

        reference = self._opened()
        made_with = (reference.facts.get("encoder") or {}).get("fingerprint")
        models = {model.get("fingerprint") for model in dict(run.output.plan.get("models") or {}).values()}
        if len(value) != reference.dim or (run.output.run != self.run.output.run and made_with not in models):
            raise BadRequest(f"these values are no embeddings by the encoder of {self.run.name}")
        return torch.tensor([value], dtype=torch.float32)

    def _nearest(self, z_BE: torch.Tensor) -> list[tuple[Place, float]]:
        reference = self._opened()
        found = reference.neighbours(z_BE, min(HITS, reference.rows))
        places = reference.table.take(found.positions_BK[0]).to_pylist()
        cosines = found.cos_BK[0].tolist()
        return [(Place(at["part"], at["row"]), cosine) for at, cosine in zip(places, cosines, strict=True)]


def searchable(run: Run) -> bool:
    """Whether a finished reference lies in the run's folder."""
    return bool(run.output.folder.exists("reference/reference.json"))
