"""What is known of a concept: its prompt, its pictures, and the seeds that regenerate them.

The pictures come with the concept's row and are inverted here, or pictures and seeds come from the output of an
`invert-images` run.

Legend: K pictures of a concept; C H W latents; E embedding width.
"""

from __future__ import annotations

import hashlib
import json
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
    """A concept and what its new seeds are grown from.

    Attributes:
        name, prompt: From the row.
        ids: Of the K pictures.
        pictures: Fitted to the model's size; fewer than K, or none, where an inversion dataset keeps none.
        seed_KCHW: Their seeds, float32 on the CPU.
        psnr: Of each picture regenerated from its seed, dB; None where it was not measured.
    """

    name: str
    prompt: str
    ids: tuple[str, ...]
    pictures: tuple[Image, ...]
    seed_KCHW: torch.Tensor
    psnr: tuple[float | None, ...]


@dataclass(frozen=True)
class Asked:
    """A concept's row, read."""

    key: str
    name: str
    prompt: str
    pictures: tuple[Any, ...]
    seeds: tuple[str, ...]


def read_asked(key: str, row: Row, most: int) -> Asked:
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
    return Asked(key, name, prompt.strip(), pictures[:most], seeds[:most])


def invert(asked: Sequence[Asked], stage: InvertImages, *, root: str, fit: Fit) -> dict[str, References | str]:
    """Key -> the concept with the seeds of its pictures, or why it cannot be had. All pictures share the solver.

    A picture whose inversion diverges is left out; the concept fails when none is left.

    Args:
        stage: With one method, and without prompts of its own.
        root: Folder that relative addresses start from.
        fit: What is done with a picture of another shape.
    """
    (label,) = stage.schemes
    found: dict[str, References | str] = {}
    rows: list[Row] = []
    opened: dict[str, list[Image]] = {}
    for concept in asked:
        try:
            pictures = [open_picture(value, root) for value in concept.pictures]
        except ConceptError as error:
            found[concept.key] = f"concept {concept.name}: {error}"
            continue
        opened[concept.key] = [to_picture(fit_picture(picture, stage.geometry.size, fit)) for picture in pictures]
        rows += [
            {"id": f"{concept.key}/{number}", "image": picture, "prompt": concept.prompt, "method": label}
            for number, picture in enumerate(opened[concept.key])
        ]
    done = {row["id"]: row for row in stage(rows)}
    for concept in asked:
        if concept.key not in opened:
            continue
        own = [done[f"{concept.key}/{number}"] for number in range(len(opened[concept.key]))]
        good = [number for number, row in enumerate(own) if row["status"] == "ok"]
        if own and not good:
            found[concept.key] = f"concept {concept.name}: no picture could be inverted: {own[0]['error']}"
            continue
        found[concept.key] = References(
            concept.name,
            concept.prompt,
            tuple(_address(concept.pictures[number], number, root) for number in good),
            tuple(opened[concept.key][number] for number in good),
            _stack([own[number]["latent"] for number in good], stage.geometry.latent_shape),
            tuple(own[number]["psnr"] for number in good),
        )
    return found


def _address(value: Any, number: int, root: str) -> str:
    """How a picture is named among the parents: by its address below `root`, where it has one."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value.removeprefix(f"{root.rstrip('/')}/") if isinstance(value, str) else f"picture {number}"


def _stack(latents: Iterable[Any], shape: tuple[int, int, int]) -> torch.Tensor:
    own = [torch.from_numpy(np.asarray(latent, dtype=np.float32).reshape(shape)) for latent in latents]
    return torch.stack(own) if own else torch.empty((0, *shape))


# --- seeds from an inversion dataset ----------------------------------------------------------------------------------


class SeedDataset:
    """The finished output of an `invert-images` run, local or at any fsspec address.

    Args:
        path: Its folder.
        by: Its column that holds the concept's name.
        unet: Fingerprint of the U-Net that the pictures are to be drawn with.

    Raises:
        ValueError: No such output, no such column, several methods in it, or another model than the job's.
    """

    def __init__(self, path: str, by: str, unet: str) -> None:
        import fsspec
        import pyarrow.dataset as ds

        fingerprint(path)
        filesystem, root = fsspec.core.url_to_fs(path)
        self.path, self.by = path, by
        self.data = ds.dataset(f"{root.rstrip('/')}/data", format="parquet", filesystem=filesystem)
        note = json.loads((self.data.schema.metadata or {}).get(b"latentmill", b"{}"))
        if "latent" not in self.data.schema.names or not str(note.get("stage")).endswith(":InvertImages"):
            raise ValueError(f"seeds: {path} is no output of an invert-images run")
        made_with = note["models"].get("unet", {}).get("fingerprint")
        if made_with != unet:
            raise ValueError(f"seeds: {path} was inverted with another model than this job's; seeds belong to a model")
        methods = note["config"].get("methods", ())
        if len(methods) != 1:
            raise ValueError(f"seeds: {path} holds {len(methods)} methods of inversion; invert with one")

    def find(self, asked: Sequence[Asked], shape: tuple[int, int, int], most: int) -> dict[str, References | str]:
        """Key -> the concept with its seeds in the order of their ids, or why it has none.

        Args:
            asked: Concepts; one that lists ids in ``seeds`` takes these, any other the rows that bear its name.
            shape: Of a latent.
            most: Seeds a concept.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        names = self.data.schema.names
        by_name = sorted({concept.name for concept in asked if not concept.seeds})
        if by_name and self.by not in names:
            problem = (
                f"{self.path} has no column {self.by!r} with concept names; keep it in the inversion "
                f"(keep: [{self.by}]), or list ids in the column 'seeds'"
            )
            return dict.fromkeys((concept.key for concept in asked), problem)
        listed = sorted({one for concept in asked for one in concept.seeds})
        wanted = pc.field("id").isin(pa.array(listed, pa.string()))
        if by_name:
            wanted = wanted | pc.field(self.by).isin(by_name)
        columns = [name for name in ("id", self.by, "latent", "picture", "psnr") if name in names]
        table = self.data.to_table(columns, filter=(pc.field("status") == "ok") & wanted)
        rows = {row["id"]: row for row in table.sort_by("id").to_pylist()}
        return {concept.key: self._references(concept, rows, shape, most) for concept in asked}

    def _references(
        self, concept: Asked, rows: Mapping[str, Row], shape: tuple[int, int, int], most: int
    ) -> References | str:
        missing = [one for one in concept.seeds if one not in rows]
        if missing:
            return f"concept {concept.name}: {self.path} has no inverted row {missing[0]!r}"
        own = [rows[one] for one in concept.seeds] or [row for row in rows.values() if row[self.by] == concept.name]
        own = own[:most]
        if not own:
            return f"concept {concept.name}: {self.path} has no inverted row with {self.by} {concept.name!r}"
        if any(len(row["latent"]) != np.prod(shape) for row in own):
            return f"concept {concept.name}: the latents in {self.path} are of another size than {shape}"
        pictures = [open_picture(row["picture"]) for row in own if row.get("picture")]
        return References(
            concept.name, concept.prompt, tuple(row["id"] for row in own), tuple(pictures),
            _stack([row["latent"] for row in own], shape), tuple(row.get("psnr") for row in own),
        )  # fmt: skip


def fingerprint(path: str) -> str:
    """Which run an output folder holds; part of the fingerprint of what is made from it.

    Raises:
        ValueError: There is no finished run.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(path)
    try:
        data: bytes = filesystem.cat_file(f"{root.rstrip('/')}/_SUCCESS")
    except FileNotFoundError:
        raise ValueError(f"seeds: {path} is no finished output of an invert-images run (no _SUCCESS in it)") from None
    return hashlib.blake2b(data, digest_size=16).hexdigest()
