"""Rows to what a method starts from: the picture's latent, the caption's condition.

A picture that comes under several methods is encoded once, and so is its floor decoded; a caption is read once.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.contract import Row
from stages.inversion.metrics import measure_pictures
from stages.inversion.settings import InvertImagesSettings
from stages.inverter.model import TextInverter
from stages.models.buckets import Size
from stages.models.captions import cuts, token_counts
from stages.models.latent import Condition, LatentModel
from stages.models.pictures import Fit, fit_picture, fitted

if TYPE_CHECKING:
    from PIL.Image import Image

Key = tuple[str, bool]
"""A picture: its id, and whether the row's id had its method behind that."""
T = TypeVar("T")


def picture_of(row_id: str, label: object) -> Key:
    """The picture that a row stands for, whose other rows have other methods at the ends of their ids."""
    picture = row_id.removesuffix(f"/{label}")
    return picture, picture != row_id


@dataclass(frozen=True)
class Seen:
    """What the autoencoder makes of a picture, on the CPU.

    Attributes:
        floor: Measures of what its latent decodes to.
        decoded_CHW: That picture, where somebody will want it.
        read: What a text inverter reads out of the latent.
    """

    z_CHW: torch.Tensor
    floor: dict[str, float]
    decoded_CHW: torch.Tensor | None
    read: dict[str, torch.Tensor]


class Preparation:
    """Rows with `image` and `key` to rows with `x`, `z`, `condition`, the floor's measures and what else is known.

    Args:
        model: Of any size: captions and latents are prepared for that of the scheme.
        known: Captions whose conditions are kept for rows to come.
    """

    def __init__(
        self,
        settings: InvertImagesSettings,
        model: LatentModel,
        inverter: TextInverter | None,
        known: Callable[[], int],
    ) -> None:
        self.settings, self.model, self.inverter, self.known = settings, model, inverter, known
        self.fit: Fit = "crop" if settings.fit == "bucket" else settings.fit
        self._conditions: dict[tuple[str, bool, Size], Condition] = {}
        self._counts: dict[str, dict[str, Any]] = {}

    def fitted(self, picture: Image, size: Size) -> Image:
        """The picture as it is inverted."""
        return fitted(picture, size, self.fit)

    def prompt_of(self, row: Row) -> str:
        """What the picture is inverted under."""
        if self.inverter is not None:
            return ""
        return self.settings.prompt if self.settings.prompt is not None else str(row.get("prompt") or "")

    @torch.no_grad()
    def __call__(
        self, model: LatentModel, guided: bool, rows: Sequence[Row], seen: dict[Key, Seen], kept: Container[Key]
    ) -> Iterator[Row]:
        """The rows prepared.

        Args:
            model: Of the rows' size.
            guided: Conditions need their negative side.
            seen: What is known of pictures; what becomes known is added.
            kept: Pictures whose decoded latents somebody will want.
        """
        size = model.geometry.picture_size
        own = [fit_picture(row["image"], size, self.fit) for row in rows]
        self._see(rows, own, seen, kept)
        pictures, prompts = [seen[row["key"]] for row in rows], [self.prompt_of(row) for row in rows]
        told, counted = self.conditions(model, prompts, guided), self._counted(prompts)
        if self.inverter is not None:
            told = self._spoken(told, pictures)
        for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            yield {
                "id": row["id"], "x": own[i], "z": picture.z_CHW, "prompt": prompts[i], "counted": counted[i],
                "condition": told[i], "read": {name: value.numpy() for name, value in picture.read.items()},
                "decoded": picture.decoded_CHW,
                **{f"floor_{name}": value for name, value in picture.floor.items()},
            }  # fmt: skip

    def _see(
        self, rows: Sequence[Row], own: Sequence[torch.Tensor], seen: dict[Key, Seen], kept: Container[Key]
    ) -> None:
        """Encode those of the pictures (3, H, W) that are not known yet, and decode them again."""
        new = [i for i, row in enumerate(rows) if row["key"] not in seen]
        if not new:
            return
        x_NCHW = torch.stack([own[i] for i in new]).to(self.model.device)
        z_NCHW = self.model.encode(x_NCHW)
        decoded_NCHW = self.model.decode(z_NCHW)
        floor = measure_pictures(decoded_NCHW, x_NCHW)
        read: dict[str, torch.Tensor] = {}
        if self.inverter is not None:
            text_NLE, pooled_NE = self.inverter(z_NCHW)
            read = {"text_latent": text_NLE.half()} | ({} if pooled_NE is None else {"pooled": pooled_NE.half()})
        for n, i in enumerate(new):
            key = rows[i]["key"]
            seen[key] = Seen(
                z_NCHW[n].to("cpu", copy=True),
                {name: values[n] for name, values in floor.items()},
                decoded_NCHW[n].to("cpu", copy=True) if key in kept else None,
                {name: value[n].cpu() for name, value in read.items()},
            )

    def conditions(self, model: LatentModel, prompts: Sequence[str], guided: bool) -> list[Condition]:
        """Each prompt's condition, without a batch dimension, on the CPU; rows of one prompt share it.

        Args:
            model: Of the rows' size.
        """
        size, negative = model.geometry.picture_size, self.settings.negative

        def made(new: list[tuple[str, bool, Size]]) -> Iterator[Condition]:
            condition = model.condition([prompt for prompt, *_ in new], guided=guided, negative=negative)
            for i in range(len(new)):
                yield {name: value[i].to("cpu", copy=True) for name, value in condition.items()}

        return _recalled(self._conditions, [(prompt, guided, size) for prompt in prompts], made, self.known())

    def _spoken(self, told: Sequence[Condition], pictures: Sequence[Seen]) -> list[Condition]:
        """Conditions whose text is what is read out of the pictures, as it will be stored."""
        read = {name: torch.stack([one.read[name] for one in pictures]).float() for name in pictures[0].read}
        text = self.model.text_condition(*(value.to(self.model.device) for value in read.values()))
        return [{**one, **{name: value[i].cpu() for name, value in text.items()}} for i, one in enumerate(told)]

    def _counted(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """What stands in `TOKEN_COLUMNS`, and in `CUT_COLUMN` where there is one; nothing where an inverter speaks in
        the captions' place."""
        if self.inverter is not None:
            return [{} for _ in prompts]
        return _recalled(self._counts, prompts, self._count, self.known())

    def _count(self, prompts: list[str]) -> Iterable[dict[str, Any]]:
        counted: list[dict[str, Any]] = [*token_counts(prompts, self.model.readers)]
        if self.model.geometry.grid is not None:
            for made, cut in zip(counted, cuts(prompts, self.model.readers), strict=True):
                made |= cut
        return counted


def _recalled(known: dict[Any, T], keys: Sequence[Any], make: Callable[[list[Any]], Iterable[T]], most: int) -> list[T]:
    """What belongs to the keys; what is not known is made, and the `most` latest are kept."""
    if new := list(dict.fromkeys(key for key in keys if key not in known)):
        known |= dict(zip(new, make(new), strict=True))
    found = [known[key] for key in keys]
    for key in list(known)[: max(0, len(known) - most)]:
        del known[key]
    return found
