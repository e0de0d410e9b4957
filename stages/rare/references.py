"""What is known of a concept: its prompt, its pictures, and the noise latents that regenerate them.

The pictures come with the concept's row and are inverted here, or pictures and latents come from the output of an
`invert-images` run (`stages.rare.inverted`).

Legend: K pictures of a concept; C H W latents; E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.contract import Row
from stages.concepts.concept import ConceptError, open_picture, picture_list
from stages.inversion.stage import InvertImages
from stages.models.pictures import fit_picture, to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from stages.models.pictures import Fit

PICTURE_COLUMNS = ("pictures", "with")
"""Where a row's pictures are looked for, in this order."""


@dataclass(frozen=True)
class References:
    """A concept and what new noise is grown from.

    Attributes:
        name, prompt: From the row.
        ids: Of the K pictures.
        pictures: Fitted to the model's size; fewer than K, or none, where an inversion dataset keeps none.
        z_KCHW: Their noise latents z_T, float32 on the CPU.
        psnr: Of each picture regenerated from its latent, dB; None where it was not measured.
    """

    name: str
    prompt: str
    ids: tuple[str, ...]
    pictures: tuple[Image, ...]
    z_KCHW: torch.Tensor
    psnr: tuple[float | None, ...]


@dataclass(frozen=True)
class ConceptRow:
    """A concept's row, read.

    Attributes:
        key: Id of the concept.
        name, prompt: Of the concept.
        pictures: As the row has them: addresses, bytes, pictures.
        seeds: Ids of rows in the inversion dataset.
    """

    key: str
    name: str
    prompt: str
    pictures: tuple[Any, ...]
    seeds: tuple[str, ...]


def read_concept_row(key: str, row: Row, most: int) -> ConceptRow:
    """What a row says about its concept; at most `most` of its pictures are taken.

    Columns: ``name`` (left out: the id), ``prompt``, ``pictures`` (or ``with``): a list of pictures, ``seeds``: a list
    of ids in the inversion dataset.

    Raises:
        ConceptError: Without a prompt there is nothing to draw.
    """
    name = str(row.get("name") or key)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConceptError(f"concept {name}: the column 'prompt' is empty; write what to draw, such as 'a red moon'")
    found = next((column for column in PICTURE_COLUMNS if row.get(column) is not None), PICTURE_COLUMNS[0])
    pictures = picture_list(name, found, row.get(found))
    seeds = tuple(str(one) for one in picture_list(name, "seeds", row.get("seeds")))
    return ConceptRow(key, name, prompt.strip(), pictures[:most], seeds[:most])


def invert(
    concepts: Sequence[ConceptRow], stage: InvertImages, *, root: str, fit: Fit, allow: Sequence[str] = ()
) -> dict[str, References | str]:
    """Key -> the concept with the latents of its pictures, or why it cannot be had. All pictures share the solver.

    A picture whose inversion diverges is left out; the concept fails when none is left.

    Args:
        stage: With one method, and without prompts of its own.
        root: Folder that relative addresses start from, and that addresses may lie in.
        fit: What is done with a picture of another shape.
        allow: Further folders and beginnings of addresses that they may lie below.
    """
    (method,) = stage.settings.methods
    geometry = stage.model.geometry
    found: dict[str, References | str] = {}
    rows: list[Row] = []
    opened: dict[str, list[Image]] = {}
    for concept in concepts:
        try:
            pictures = [open_picture(value, root, allow) for value in concept.pictures]
        except ConceptError as error:
            found[concept.key] = f"concept {concept.name}: {error}"
            continue
        opened[concept.key] = [to_picture(fit_picture(picture, geometry.picture_size, fit)) for picture in pictures]
        rows += [
            {"id": f"{concept.key}/{number}", "image": picture, "prompt": concept.prompt, "method": method.label}
            for number, picture in enumerate(opened[concept.key])
        ]
    done = {row["id"]: row for row in stage(rows)}
    for concept in concepts:
        if concept.key in opened:
            own = [done[f"{concept.key}/{number}"] for number in range(len(opened[concept.key]))]
            found[concept.key] = _inverted(concept, opened[concept.key], own, geometry.latent_shape, root)
    return found


def _inverted(
    concept: ConceptRow, pictures: Sequence[Image], rows: Sequence[Row], shape: tuple[int, int, int], root: str
) -> References | str:
    """A concept with what the inversion of its pictures gave."""
    good = [number for number, row in enumerate(rows) if row["status"] == "ok"]
    if rows and not good:
        return f"concept {concept.name}: no picture could be inverted: {rows[0]['error']}"
    return References(
        concept.name,
        concept.prompt,
        tuple(_address(concept.pictures[number], number, root) for number in good),
        tuple(pictures[number] for number in good),
        stacked([rows[number]["latent"] for number in good], shape),
        tuple(rows[number]["psnr"] for number in good),
    )


def _address(value: Any, number: int, root: str) -> str:
    """How a picture is named among the parents: by its address below `root`, where it has one."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value.removeprefix(f"{root.rstrip('/')}/") if isinstance(value, str) else f"picture {number}"


def stacked(latents: Iterable[Any], shape: tuple[int, int, int]) -> torch.Tensor:
    """Latents as they are stored -> z_KCHW, float32; empty for none."""
    own = [torch.from_numpy(np.asarray(latent, dtype=np.float32).reshape(shape)) for latent in latents]
    return torch.stack(own) if own else torch.empty((0, *shape))
