"""What OVI is measured against, without any optimisation: the text embedding itself, and the nearest images.

Legend: B rows, E embedding width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.contract import Row, failed, ok
from stages.engine.passthrough import in_batches
from stages.ovi.constraints import require_rows
from stages.ovi.context import BATCH, RowMap

if TYPE_CHECKING:
    from index.reference import Reference


def text_embedding(rows: Iterable[Row]) -> Iterator[Row]:
    """The text embedding in the image embedding's place."""
    return in_batches(
        rows, BATCH, lambda good: (ok(row, embedding=np.asarray(row["text"], np.float32), passes=0) for row in good)
    )


def retrieval(reference: Reference, k: int, batch: int = BATCH) -> RowMap:
    """The mean of the k image embeddings that are nearest to the text by cosine, for so many rows at once.

    Raises:
        ValueError: The reference has fewer than k rows.
    """
    require_rows(reference, k)

    def means(rows: list[Row]) -> Iterator[Row]:
        t_BE = torch.from_numpy(np.stack([row["text"] for row in rows])).float()
        mean_BE = reference.index.gather(reference.positions(t_BE, k)).mean(1)
        return (ok(row, embedding=z_E, passes=0) for row, z_E in zip(rows, mean_BE, strict=True))

    return lambda rows: in_batches(rows, batch, means)


def rescaled(method: RowMap, norm: float) -> RowMap:
    """Another method, its embeddings scaled to a norm; the direction stays."""

    def scaled(rows: list[Row]) -> Iterator[Row]:
        for row in rows:
            length = float(np.linalg.norm(row["embedding"]))
            if length > 0:
                yield {**row, "embedding": (row["embedding"] * (norm / length)).astype(np.float32)}
            else:
                yield failed(row, "the embedding is zero and cannot be rescaled")

    return lambda rows: in_batches(method(rows), BATCH, scaled)
