"""The stage of `decode`: an embedding in, its picture out.

Legend: B rows, E embedding width, T states of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pipeline.contract import Column, Row, StageInfo, failed, ok
from stages.decode.decoders import kind_of
from stages.decode.settings import DecodeSettings
from stages.engine.device import chosen_device
from stages.engine.passthrough import in_batches
from stages.engine.room import Rooms


class DecodeEmbeddings:
    """Rows with an ``embedding`` to rows with an ``image``; noise is drawn from the seed and the row's id.

    Args:
        device: None: a GPU where there is one.
    """

    Settings = DecodeSettings

    def __init__(self, settings: DecodeSettings, device: str | None = None) -> None:
        kind = kind_of(settings.decode)
        width, length = kind.width(settings), kind.length(settings)
        self.decode, self.shape = settings.decode, (width,) if length is None else (length, width)
        device = chosen_device(device)
        self.decoder, self.rooms = kind.load(settings, settings.seed, device), Rooms(device)

    @staticmethod
    def describe(settings: DecodeSettings) -> StageInfo:
        kind = kind_of(settings.decode)
        metadata = {"decoder.width": str(kind.width(settings))}
        if (length := kind.length(settings)) is not None:
            metadata["decoder.length"] = str(length)
        return StageInfo((Column("image", "image"),), kind.identity(settings), metadata, {"embedding": "value"},
                         needs={("embedding",): "each row's picture is drawn from its embedding"})  # fmt: skip

    @property
    def holds(self) -> int:
        """Most rows at a time: a batch, and another that comes in behind it."""
        return 2 * self.decode.batch_size

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return in_batches(rows, self.decode.batch_size, self._drawn)

    def _drawn(self, rows: list[Row]) -> Iterator[Row]:
        good: list[Row] = []
        vectors: list[np.ndarray] = []
        for row in rows:
            z_E, problem = self._vector(row)
            if problem:
                yield failed(row, problem)
            else:
                good.append(row)
                vectors.append(z_E)
        if not good:
            return
        z_BE = torch.from_numpy(np.stack(vectors))
        keys = [str(row["id"]) for row in good]
        parts = self.rooms["pictures"].parts(len(good), lambda part: self.decoder.pictures(z_BE[part], keys[part]))
        pictures = [picture for part in parts for picture in part]
        yield from (ok(row, image=picture) for row, picture in zip(good, pictures, strict=True))

    def _vector(self, row: Row) -> tuple[np.ndarray, str]:
        """The row's embedding (E,), or sequence (T, E), which may come flat; and what is wrong with it, or ""."""
        try:
            z_E = np.asarray(row.get("embedding"), dtype=np.float32)
        except (TypeError, ValueError) as error:
            return np.empty(0), f"the column 'embedding' holds no list of numbers: {error}"
        if z_E.shape not in (self.shape, (math.prod(self.shape),)):
            shape = f"width {len(z_E)}" if z_E.ndim == 1 else f"shape {z_E.shape}"
            takes = " x ".join(map(str, self.shape))
            return z_E, f"the embedding has {shape}, the decoder {self.decode.model} takes {takes} numbers"
        if not np.isfinite(z_E).all():
            return z_E, "the embedding is not finite and cannot be decoded"
        return z_E.reshape(self.shape), ""
