"""Noise latents of a concept from the finished output of an `invert-images` run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.access import filesystem as filesystem_of
from pipeline.contract import Row
from stages.concepts.concept import open_picture
from stages.rare.references import ConceptRow, References, stacked


class InvertedDataset:
    """The finished output of an `invert-images` run, local or at any fsspec address.

    Args:
        path: Its folder.
        by: Its column that holds the concept's name.
        denoiser: Fingerprint of the U-Net that the pictures are to be drawn with.
        sampler: The setting `sampler` that they are to be drawn with.

    Raises:
        ValueError: No such output, no such column, several methods in it, or another model or sampler than the job's.
    """

    def __init__(self, path: str, by: str, denoiser: str, sampler: str | None = None) -> None:
        import pyarrow.dataset as ds

        fingerprint(path)
        filesystem, root = filesystem_of(path)
        self.path, self.by = path, by
        self.data = ds.dataset(f"{root.rstrip('/')}/data", format="parquet", filesystem=filesystem)
        note = json.loads((self.data.schema.metadata or {}).get(b"latentmill", b"{}"))
        if "latent" not in self.data.schema.names or not str(note.get("stage")).endswith(":InvertImages"):
            raise ValueError(f"seeds: {path} is no output of an invert-images run")
        made_with = [note["models"].get(part, {}).get("fingerprint") for part in ("unet", "transformer")]
        if denoiser not in made_with:
            raise ValueError(f"seeds: {path} was inverted with another model than this job's; seeds belong to a model")
        if (made_for := note["config"].get("sampler")) != sampler:
            raise ValueError(
                f"seeds: {path} was inverted with sampler: {made_for or 'null'}, and this job draws with sampler: "
                f"{sampler or 'null'}; seeds belong to a sampler, so set the same"
            )
        if note["config"].get("fit") == "bucket":
            raise ValueError(
                f"seeds: {path} was inverted with fit: bucket; seeds are mixed in one shape, so invert squares"
            )
        methods = note["config"].get("methods", ())
        if len(methods) != 1:
            raise ValueError(f"seeds: {path} holds {len(methods)} methods of inversion; invert with one")

    def find(
        self, concepts: Sequence[ConceptRow], shape: tuple[int, int, int], most: int
    ) -> dict[str, References | str]:
        """Key -> the concept with its latents in the order of their ids, or why it has none.

        Args:
            concepts: One that lists ids in ``seeds`` takes these, any other the rows that bear its name.
            shape: Of a latent.
            most: Latents a concept.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        names = self.data.schema.names
        by_name = sorted({concept.name for concept in concepts if not concept.seeds})
        if by_name and self.by not in names:
            problem = (
                f"by: {self.path} has no column {self.by!r} with concept names; keep it in the inversion "
                f"(keep: [{self.by}]), or list ids in the column 'seeds'"
            )
            return dict.fromkeys((concept.key for concept in concepts), problem)
        listed = sorted({one for concept in concepts for one in concept.seeds})
        wanted = pc.field("id").isin(pa.array(listed, pa.string()))
        if by_name:
            wanted = wanted | pc.field(self.by).isin(by_name)
        columns = [name for name in ("id", self.by, "latent", "picture", "psnr") if name in names]
        table = self.data.to_table(columns, filter=(pc.field("status") == "ok") & wanted)
        rows = {row["id"]: row for row in table.sort_by("id").to_pylist()}
        return {concept.key: self._references(concept, rows, shape, most) for concept in concepts}

    def _references(
        self, concept: ConceptRow, rows: Mapping[str, Row], shape: tuple[int, int, int], most: int
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
            stacked([row["latent"] for row in own], shape), tuple(row.get("psnr") for row in own),
        )  # fmt: skip


def fingerprint(path: str) -> str:
    """Which run an output folder holds; part of the fingerprint of what is made from it.

    Raises:
        ValueError: There is no finished run.
    """
    filesystem, root = filesystem_of(path)
    try:
        data: bytes = filesystem.cat_file(f"{root.rstrip('/')}/_SUCCESS")
    except FileNotFoundError:
        raise ValueError(f"seeds: {path} is no finished output of an invert-images run (no _SUCCESS in it)") from None
    return hashlib.blake2b(data, digest_size=16).hexdigest()
