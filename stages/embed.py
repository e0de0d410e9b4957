"""Pictures to image embeddings, fast: preparation in threads, batches of one shape, statistics on the way.

Legend: B rows of a batch, H W C picture, E embedding width. Embeddings are the raw projected vectors, norm kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from index.gaussian import Accumulator
from pipeline.contract import Column, Row, StageInfo, batches, failed, ok
from stages.models.clip import ImageEncoder, embedding_width, identity

if TYPE_CHECKING:
    from PIL.Image import Image

Stored = Literal["float16", "float32"]
Precision = Literal["float32", "float16", "bfloat16"]

TOLERANCE = 1e-5
CPU_BATCH = 32
MOST_BATCH = 512  # encoders of this family gain nothing beyond it
MEMORY_SHARE = 0.6  # of the device's free memory


@dataclass(frozen=True)
class Recipe:
    """What an image processor does, in the order in which it does it.

    Attributes:
        short: Length that the shorter edge is resized to, or None.
        size: (height, width) that a picture is resized to, or None.
        resample: Pillow's filter.
        crop: (height, width) cut from the middle, or None.
        scale, mean_C, std_C: ``(x * scale - mean) / std`` on bytes.
    """

    short: int | None
    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]

    @staticmethod
    def of(processor: Any) -> Recipe | None:
        """The recipe of a processor of transformers; None where it asks for something else."""
        settings = processor.to_dict()
        size, crop = dict(settings.get("size") or {}), dict(settings.get("crop_size") or {})
        resize = settings.get("do_resize", False)
        known = not resize or set(size) in ({"shortest_edge"}, {"height", "width"})
        if not known or settings.get("do_pad") or not settings.get("do_rescale") or not settings.get("do_normalize"):
            return None
        return Recipe(
            short=size["shortest_edge"] if resize and "shortest_edge" in size else None,
            size=(size["height"], size["width"]) if resize and "height" in size else None,
            resample=int(settings["resample"]),
            crop=(crop["height"], crop["width"]) if settings.get("do_center_crop") else None,
            scale=float(settings["rescale_factor"]),
            mean_C=tuple(settings["image_mean"]),
            std_C=tuple(settings["image_std"]),
        )

    def shape(self, picture: Image) -> np.ndarray:
        """The resized and cropped picture as bytes (H, W, C); Pillow does the work with the interpreter released."""
        width, height = picture.size
        if self.size is not None:
            height, width = self.size
        elif self.short is not None:
            long = int(self.short * max(width, height) / min(width, height))
            width, height = (self.short, long) if width <= height else (long, self.short)
        if picture.size != (width, height):
            picture = picture.resize((width, height), resample=self.resample)
        if self.crop is None or self.crop == (height, width):
            return np.asarray(picture)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        if top < 0 or left < 0:
            raise ValueError(f"a picture of {width}x{height} is smaller than the crop of {self.crop[1]}x{self.crop[0]}")
        return np.asarray(picture)[top : top + self.crop[0], left : left + self.crop[1]]


class Preparation:
    """An image processor's work, split: Pillow's part a picture, in threads; the arithmetic a batch, on the device.

    At the start it is compared with the processor on pictures of awkward sizes. Where the two differ by more than
    `TOLERANCE` (a processor on another backend, or of another kind), the processor itself does the work.
    """

    def __init__(self, processor: Any, device: str) -> None:
        self._processor = processor
        self._device = device
        recipe = Recipe.of(processor)
        self._recipe = recipe if recipe is not None and _agrees(recipe, processor) else None

    @property
    def is_split(self) -> bool:
        return self._recipe is not None

    def one(self, picture: Image) -> torch.Tensor:
        """A picture, ready to be stacked: bytes (H, W, C), or the processor's own floats (C, H, W)."""
        if self._recipe is not None:
            return torch.from_numpy(np.array(self._recipe.shape(picture)))
        return self._processor(images=picture, return_tensors="pt").pixel_values[0]

    def batch(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Pixel values (B, C, H, W), float32, on the device."""
        stacked = torch.stack(pictures)
        if self._device.startswith("cuda"):
            stacked = stacked.pin_memory()
        stacked = stacked.to(self._device, non_blocking=True)
        return _normalised(stacked, self._recipe) if self._recipe is not None else stacked


def _normalised(x_BHWC: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    mean_C, std_C = (torch.tensor(v, device=x_BHWC.device) for v in (recipe.mean_C, recipe.std_C))
    return ((x_BHWC.float() * recipe.scale - mean_C) / std_C).permute(0, 3, 1, 2).contiguous()


def _agrees(recipe: Recipe, processor: Any) -> bool:
    from PIL import Image

    rng = np.random.default_rng(0)
    for height, width in ((37, 53), (301, 211), (640, 641)):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        theirs = processor(images=picture, return_tensors="pt").pixel_values
        ours = _normalised(torch.from_numpy(np.array(recipe.shape(picture)))[None], recipe)
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > TOLERANCE:
            return False
    return True


class Statistics:
    """Counts and Gaussian sums of a shard's embeddings, as they are stored."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._sums = Accumulator(dim)

    def add(self, z_BE: np.ndarray) -> None:
        self._sums.add(z_BE)

    def take(self) -> dict[str, np.ndarray]:
        """The shard's sums as arrays; starts the next shard's."""
        arrays = self._sums.moments().to_arrays()
        self._sums = Accumulator(self._dim)
        return arrays


def _columns(dim: int, dtype: Stored) -> tuple[Column, ...]:
    return (
        Column("embedding", "tensor", (dim,), dtype, doc="raw projected image embedding, norm kept"),
        Column("norm", "float32", doc="Euclidean norm of the embedding"),
    )


class Embed:
    """Rows with a picture in ``image`` to rows with its ``embedding`` and ``norm``.

    Args:
        encoder: Folder or hub id of a CLIP-family model, or of a pipeline with an image encoder.
        revision: On the hub.
        dtype: How embeddings are stored.
        precision: What the encoder computes in.
        batch_size: Pictures a batch; None: found by the device's memory. A batch that does not fit is halved.
        threads: Threads that prepare pictures.
        device: None: a GPU where there is one.
    """

    def __init__(
        self,
        encoder: str,
        revision: str | None = None,
        dtype: Stored = "float32",
        precision: Precision = "float32",
        batch_size: int | None = None,
        threads: int = 2,
        device: str | None = None,
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = ImageEncoder(encoder, revision, self.device, getattr(torch, precision))
        self.dtype = dtype
        self.threads = threads
        self.preparation = Preparation(self.encoder.processor, self.device)
        self.statistics = Statistics(embedding_width(encoder, revision))
        self.batch_size = batch_size or self._fitting_batch()

    @staticmethod
    def describe(
        encoder: str, revision: str | None = None, dtype: Stored = "float32", precision: Precision = "float32",
        **_unused: Any,
    ) -> StageInfo:  # fmt: skip
        dim = embedding_width(encoder, revision)
        models = {"image_encoder": identity(encoder, "image", revision)}
        return StageInfo(_columns(dim, dtype), models, {"embedding.precision": precision})

    def take_summary(self) -> dict[str, np.ndarray]:
        return self.statistics.take()

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
        """Batches of rows with their prepared pictures (or why there is none), two batches ahead of the device."""
        waiting: deque[tuple[Row, Future[torch.Tensor | str]]] = deque()
        source = iter(rows)
        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                ahead = 3 * self.batch_size - len(waiting)
                waiting.extend((row, pool.submit(self._prepare, row)) for row in islice(source, max(ahead, 0)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                yield [row for row, _ in batch], [future.result() for _, future in batch]

    def _prepare(self, row: Row) -> torch.Tensor | str:
        picture = row.get("image")
        if picture is None:
            return "there is no picture in the column 'image'; map one to it with input.columns"
        try:
            return self.preparation.one(picture)
        except Exception as error:  # whatever a processor says about one picture must not stop the others
            return f"the picture cannot be prepared for the encoder: {error}"

    def _encode(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, E), still on the device. Batches are filled up to one shape, so that shapes never change."""
        done: list[torch.Tensor] = []
        while pictures:
            part = pictures[: self.batch_size]
            padding = [part[-1]] * (self.batch_size - len(part))
            try:
                z_BE = self._forward(self.preparation.batch(part + padding))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                continue
            done.append(z_BE[: len(part)])
            pictures = pictures[len(part) :]
        return torch.cat(done)

    def _forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(pixels_BCHW)

    def _outputs(self, rows: list[Row], z_BE: torch.Tensor) -> Iterator[Row]:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and fails its row below
            stored_BE = z_BE.float().cpu().numpy().astype(self.dtype)
        exact_BE = stored_BE.astype(np.float64)
        norm_B = np.linalg.norm(exact_BE, axis=1)
        self.statistics.add(exact_BE[np.isfinite(norm_B)])
        for row, z_E, norm in zip(rows, stored_BE, norm_B, strict=True):
            if np.isfinite(norm):
                yield ok(row, embedding=z_E, norm=float(norm))
            else:
                yield failed(row, f"the embedding does not fit {self.dtype}, or is not a number; try float32")

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
        free, _ = torch.cuda.mem_get_info()
        fitting = int(MEMORY_SHARE * free / row_bytes)
        return 1 << max(0, min(fitting, MOST_BATCH).bit_length() - 1)


class Adopt:
    """Rows with an ``embedding`` that was made elsewhere: checked, counted, stored as they are.

    Args:
        dim: Width that every embedding must have.
        encoder: The image encoder they were made with, if it is known.
        dtype: How they are stored.
    """

    def __init__(
        self, dim: int, encoder: str | None = None, revision: str | None = None, dtype: Stored = "float32"
    ) -> None:
        self.dim, self.dtype = dim, dtype
        self.statistics = Statistics(dim)

    @staticmethod
    def describe(
        dim: int, encoder: str | None = None, revision: str | None = None, dtype: Stored = "float32"
    ) -> StageInfo:
        models = {} if encoder is None else {"image_encoder": identity(encoder, "image", revision)}
        return StageInfo(_columns(dim, dtype), models, {"embedding.adopted": "true"})

    def take_summary(self) -> dict[str, np.ndarray]:
        return self.statistics.take()

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batches(rows, 1024):
            good: list[np.ndarray] = []
            for row in batch:
                try:
                    with np.errstate(over="ignore"):
                        z_E = np.asarray(row["embedding"], dtype=np.float64).astype(self.dtype)
                except (TypeError, ValueError, KeyError) as error:
                    yield failed(row, f"the column 'embedding' holds no list of numbers: {error}")
                    continue
                if z_E.shape != (self.dim,):
                    yield failed(row, f"the embedding has shape {z_E.shape}, expected ({self.dim},)")
                elif not np.isfinite(z_E).all():
                    yield failed(row, f"the embedding does not fit {self.dtype}, or is not a number")
                else:
                    good.append(z_E)
                    norm = float(np.linalg.norm(z_E.astype(np.float64)))
                    yield ok(row, embedding=z_E, norm=norm)
            if good:
                self.statistics.add(np.stack(good))
