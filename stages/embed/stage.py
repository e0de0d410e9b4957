"""Pictures to image embeddings, fast: preparation in threads, batches of one shape, statistics on the way.

Legend: B rows of a batch, H W C picture, E embedding width. Embeddings are the raw projected vectors, norm kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from index import joint
from index.gaussian import BLOCK_ROWS, Accumulator
from pipeline.contract import Column, Form, Row, StageInfo, failed, ok
from pipeline.pictures import BYTES_A_PIXEL
from stages.embed import captions
from stages.embed.captions import Captioner
from stages.embed.preparation import Preparation
from stages.embed.settings import AdoptSettings, EmbedSettings
from stages.engine.device import chosen_device, exact_float32, free_bytes
from stages.engine.passthrough import in_batches
from stages.engine.room import Rooms
from stages.models.clip import ImageEncoder, embedding_width, identity

if TYPE_CHECKING:
    from PIL.Image import Image

CPU_BATCH = 32
ADOPTED = 1024  # rows whose captions are embedded together
MOST_BATCH = 512  # encoders of this family gain nothing beyond it
MEMORY_SHARE = 0.6  # of the device's free memory
UNPREPARED_BYTES = 256 << 20
"""Of pictures as they came, which wait for their preparation."""


class Statistics:
    """Counts and Gaussian sums of a shard's embeddings, as they are stored: a `pipeline.contract.Tally`.

    Args:
        texts: Width of the captions' embeddings; None: there are no captions.
    """

    def __init__(self, dim: int, texts: int | None = None) -> None:
        self._sums = Accumulator(dim)
        self._pairs = None if texts is None else joint.Accumulator(texts, dim)
        self._unsummed: list[Row] = []

    def add(self, row: Row) -> None:
        """A row with an ``embedding``; one with a ``text_embedding`` too counts for the joint statistics."""
        if row["status"] != "ok":
            return
        kept = ("embedding", "text_embedding")
        self._unsummed.append({name: row[name] for name in kept if row.get(name) is not None})
        if len(self._unsummed) == BLOCK_ROWS:
            self._sum()

    def _sum(self) -> None:
        rows, self._unsummed = self._unsummed, []
        if rows:
            self._sums.add(np.stack([row["embedding"] for row in rows]))
        both = [row for row in rows if "text_embedding" in row]
        if both and self._pairs is not None:
            self._pairs.add(*(np.stack([row[name] for row in both]) for name in ("text_embedding", "embedding")))

    def summary(self) -> dict[str, np.ndarray]:
        """The sums as arrays, those of captioned rows under ``pairs.``."""
        self._sum()
        arrays = self._sums.moments().to_arrays()
        if self._pairs is not None:
            arrays |= {f"pairs.{name}": array for name, array in self._pairs.pairs().to_arrays().items()}
        return arrays


def _described(
    dim: int, settings: EmbedSettings | AdoptSettings, metadata: dict[str, str], given: dict[str, Form]
) -> StageInfo:
    """What both stages say of themselves; `given` is what they read of a row beside a caption."""
    models = {}
    if settings.encoder is not None:
        pickles = settings.allow_pickle
        models["image_encoder"] = identity(settings.encoder, "image", settings.revision, allow_pickle=pickles)
    columns = (
        Column("embedding", "tensor", (dim,), settings.store, doc="raw projected image embedding, norm kept"),
        Column("norm", "float32", doc="Euclidean norm of the embedding"),
    )
    if settings.captions is None:
        return StageInfo(columns, models, metadata, given)
    return StageInfo(
        (*columns, *captions.columns(settings.captions, settings)),
        {**models, **captions.models(settings.captions, settings)}, metadata,
        {**given, **captions.reads(settings.captions)},
    )  # fmt: skip


def _captioner(settings: EmbedSettings | AdoptSettings, device: str, rooms: Rooms) -> Captioner | None:
    return None if settings.captions is None else Captioner(settings.captions, settings, device, rooms["captions"])


class Embed:
    """Rows with a picture in ``image`` to rows with its ``embedding`` and ``norm``.

    A batch that does not fit into the device's memory is halved.

    Args:
        device: None: a GPU where there is one.
    """

    known_as = "stages.embed:Embed"
    Settings = EmbedSettings

    def __init__(self, settings: EmbedSettings, device: str | None = None) -> None:
        self.device = chosen_device(device)
        exact_float32(True)
        precision = getattr(torch, settings.precision)
        self.encoder = ImageEncoder(settings.encoder, settings.revision, self.device, precision, settings.allow_pickle)
        self.dtype, self.threads = settings.store, settings.threads
        self.preparation = Preparation(self.encoder.processor, self.device)
        self.rooms = Rooms(self.device)
        self.captioner = _captioner(settings, self.device, self.rooms)
        self.width = embedding_width(settings.encoder, settings.revision)
        self._batch = settings.batch_size or self._fitting_batch()

    @staticmethod
    def describe(settings: EmbedSettings) -> StageInfo:
        dim = embedding_width(settings.encoder, settings.revision)
        return _described(dim, settings, {"embedding.precision": settings.precision}, {"image": "picture"})

    @property
    def batch_size(self) -> int:
        """Pictures at once."""
        return min(self._batch, self.rooms["pictures"].rows)

    @property
    def holds(self) -> int:
        """Most rows at a time: prepared or about to be for three batches, and a fourth with the device."""
        return 4 * self.batch_size

    def tally(self) -> Statistics:
        """Of a shard's rows."""
        return Statistics(self.width, self.captioner.width if self.captioner else None)

    @torch.inference_mode()
    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        running: tuple[list[Row], torch.Tensor] | None = None
        for batch, pixels in self._prepared(rows):
            good = [(row, picture) for row, picture in zip(batch, pixels, strict=True) if torch.is_tensor(picture)]
            yield from (failed(r, str(p)) for r, p in zip(batch, pixels, strict=True) if not torch.is_tensor(p))
            if not good:
                continue
            z_BE = self._encode([picture for _, picture in good])
            if running is not None:  # read back while the device works on the next batch
                yield from self._outputs(*running)
            running = [row for row, _ in good], z_BE
        if running is not None:
            yield from self._outputs(*running)

    def _prepared(self, rows: Iterable[Row]) -> Iterator[tuple[list[Row], list[torch.Tensor | str]]]:
        """Batches of rows with their prepared pictures (or why there is none), two batches ahead of the device.

        The rows are without the pictures as they came, which may be large.
        """
        waiting: deque[tuple[Row, Future[torch.Tensor | str]]] = deque()
        unprepared: deque[tuple[Future[torch.Tensor | str], int]] = deque()
        source = iter(rows)
        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                for row in islice(source, max(3 * self.batch_size - len(waiting), 0)):
                    size = _bytes(row)
                    _make_room(unprepared, size)
                    future = pool.submit(self._prepare, row.get("image"))
                    waiting.append(({name: value for name, value in row.items() if name != "image"}, future))
                    unprepared.append((future, size))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                yield [row for row, _ in batch], [future.result() for _, future in batch]

    def _prepare(self, picture: Image | None) -> torch.Tensor | str:
        if picture is None:
            return "there is no picture in the column 'image'; map one to it with input.columns"
        try:
            return self.preparation.one(picture)
        except Exception as error:  # whatever a processor says about one picture must not stop the others
            return f"the picture cannot be prepared for the encoder: {error}"

    def _encode(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, E), still on the device. Batches are filled up to one shape, so that shapes never change."""
        padded = pictures + pictures[-1:] * (-len(pictures) % self.batch_size)
        parts = self.rooms["pictures"].parts(
            len(padded), lambda part: self._forward(self.preparation.batch(padded[part])), self._batch
        )  # fmt: skip
        return torch.cat([*parts])[: len(pictures)]

    def _forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(pixels_BCHW)

    def _outputs(self, rows: list[Row], z_BE: torch.Tensor) -> Iterator[Row]:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and fails its row below
            stored_BE = z_BE.float().cpu().numpy().astype(self.dtype)
        norm_B = np.linalg.norm(stored_BE.astype(np.float64), axis=1)
        good: list[Row] = []
        for row, z_E, norm in zip(rows, stored_BE, norm_B, strict=True):
            if np.isfinite(norm):
                good.append(ok(row, embedding=z_E, norm=float(norm)))
            else:
                yield failed(row, f"the embedding does not fit {self.dtype}, or is not a number; try float32")
        yield from self.captioner(good) if self.captioner else good

    @torch.inference_mode()
    def _fitting_batch(self) -> int:
        """Rows a batch by the device's memory: what a row costs is measured on batches of 2 and 4."""
        if not self.device.startswith("cuda"):
            return CPU_BATCH
        size = self.encoder.model.config.image_size

        def peak(rows: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._forward(torch.zeros(rows, 3, size, size, device=self.device))
            return torch.cuda.max_memory_allocated()

        row_bytes = max(1, (peak(4) - peak(2)) // 2)
        free = free_bytes(torch.device(self.device)) or 0
        fitting = int(MEMORY_SHARE * free / row_bytes)
        return 1 << max(0, min(fitting, MOST_BATCH).bit_length() - 1)


def _bytes(row: Row) -> int:
    """What a row's picture takes."""
    width, height = getattr(row.get("image"), "size", (0, 0))
    return width * height * BYTES_A_PIXEL


def _make_room(unprepared: deque[tuple[Future[torch.Tensor | str], int]], size: int) -> None:
    """Wait until what is not prepared yet leaves room for a further picture."""
    while unprepared and (unprepared[0][0].done() or sum(s for _, s in unprepared) + size > UNPREPARED_BYTES):
        unprepared.popleft()[0].result()


class Adopt:
    """Rows with an ``embedding`` that was made elsewhere: checked, counted, stored as they are."""

    holds = ADOPTED

    known_as = "stages.embed:Adopt"
    Settings = AdoptSettings

    def __init__(self, settings: AdoptSettings) -> None:
        self.settings = settings
        device = chosen_device(None)
        self.rooms = Rooms(device)
        self.captioner = _captioner(settings, device, self.rooms)

    @staticmethod
    def describe(settings: AdoptSettings) -> StageInfo:
        return _described(settings.dim, settings, {"embedding.adopted": "true"}, {"embedding": "value"})

    def tally(self) -> Statistics:
        """Of a shard's rows."""
        return Statistics(self.settings.dim, self.captioner.width if self.captioner else None)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return in_batches(rows, ADOPTED, self._checked)

    def _checked(self, rows: list[Row]) -> Iterator[Row]:
        dim, dtype = self.settings.dim, self.settings.store
        good: list[Row] = []
        for row in rows:
            try:
                with np.errstate(over="ignore"):
                    z_E = np.asarray(row["embedding"], dtype=np.float64).astype(dtype)
            except (TypeError, ValueError, KeyError) as error:
                yield failed(row, f"the column 'embedding' holds no list of numbers: {error}")
                continue
            if z_E.shape != (dim,):
                yield failed(row, f"the embedding has shape {z_E.shape}, expected ({dim},)")
            elif not np.isfinite(z_E).all():
                yield failed(row, f"the embedding does not fit {dtype}, or is not a number")
            else:
                norm = float(np.linalg.norm(z_E.astype(np.float64)))
                good.append(ok(row, embedding=z_E, norm=norm))
        yield from self.captioner(good) if self.captioner else good
