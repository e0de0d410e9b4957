"""Job ``reference``: pictures, or embeddings made elsewhere -> embeddings, their statistics, and an index to search."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ByteSize, Field, model_validator

from jobs.page import charts
from jobs.page.amounts import figure
from jobs.page.hits import hits
from jobs.page.html import Exhibit, Html, escape, gallery, table
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import Settings, StageSpec, added, speed
from stages.embed.settings import (
    AdoptSettings,
    Captions,
    CaptionSettings,
    ComputedEmbeddings,
    EmbedSettings,
    StoredEmbeddings,
)
from stages.models.names import ModelName

if TYPE_CHECKING:
    import numpy as np

    import pipeline.run.driver
    from index.captions import Texts
    from index.reference import Origin, Shard
    from pipeline.output.dataset import Output
    from pipeline.storage import Folder


CAPTION_NAMES = ("caption", "text", "prompt")
"""Names that captions go by, in this order."""


class IndexSettings(Settings):
    """How the nearest-neighbour index is built."""

    factory: str | None = None
    """A FAISS factory string, for instance ``IVF4096,SQ8``. Left out: chosen by rows, width and `memory`."""
    memory: ByteSize = speed(ByteSize(4 << 30))
    """What the index may take in memory. One that is larger keeps its lists on disk, mapped into memory."""
    recall: float = Field(0.95, gt=0, le=1)
    """Recall@10 against exact search, by pictures and by texts, that decides how many lists a search looks into."""
    part_rows: int = Field(1 << 17, ge=1)
    """Rows of a partial index, at least; what is lost when building is killed."""


class Reference(ComputedEmbeddings, RowJob):
    """Embeds pictures with a CLIP-family image encoder, and makes of the embeddings what searching and inverting need:
    Gaussian statistics and a nearest-neighbour index.

    The output is the dataset of embeddings, with the folder ``reference`` beside its files.
    """

    job: Literal["reference"] = "reference"
    text_encoder: ModelName | None = None
    """Folder or hub id of the text encoder that `latentmill search` uses. Left out: the one beside the encoder."""
    given: Literal["pictures", "embeddings"] = "pictures"
    """What the input's rows hold: pictures in ``image``, or finished embeddings in ``embedding``."""
    dim: int | None = Field(None, ge=1)
    """Width of given embeddings. Left out: the encoder's."""
    shrinkage: float | Literal["ledoit-wolf"] = "ledoit-wolf"
    """Of the covariance, towards a multiple of the identity: a fixed share in [0, 1], or Ledoit and Wolf's estimate."""
    index: IndexSettings = IndexSettings()
    captions: Captions | None = added()
    """Embed the pictures' captions too, and keep joint statistics of both: what the priors of ``invert-prompts`` that
    need no training rest on. ``true``: the input's own (columns ``prompt``, ``text`` or ``caption``)."""

    @model_validator(mode="after")
    def _complete(self) -> Reference:
        if self.encoder is None and (self.given == "pictures" or self.dim is None):
            needed = "set `encoder`" if self.given == "pictures" else "set `encoder`, or `dim`"
            raise ValueError(f"{needed}: the folder or hub id of the image encoder")
        if self.dim is not None and self.given == "pictures":
            raise ValueError("`dim` belongs to `given: embeddings`; pictures get the encoder's width")
        if not isinstance(self.shrinkage, str) and not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage ({self.shrinkage}) must lie between 0 and 1")
        return self

    def stage(self) -> StageSpec:
        captions = self._captions()
        if self.given == "pictures":
            return StageSpec.of("stages.embed.stage:Embed", self.part(EmbedSettings, captions=captions))
        adopted = AdoptSettings(dim=self._width(), captions=captions, **dict(self.part(StoredEmbeddings)))
        return StageSpec.of("stages.embed.stage:Adopt", adopted)

    def _captions(self) -> CaptionSettings | None:
        """Captions with the text encoder that embeds them: the one named, or the one beside the image encoder."""
        from stages.models.clip import has_text_encoder

        if self.captions is None:
            return None
        revision = None if self.text_encoder else self.revision
        text = self.text_encoder or self.encoder
        if text is None or not (self.text_encoder or has_text_encoder(text, revision)):
            said = "no encoder is named" if text is None else f"{text} has no text encoder"
            raise ValueError(f"captions: {said}; name one with `text_encoder`, so that captions can be embedded")
        return CaptionSettings(encoder=text, revision=revision, **dict(self.captions))

    def _width(self) -> int:
        from stages.models.clip import embedding_width

        if self.encoder is None:
            assert self.dim is not None
            return self.dim
        return self.dim or embedding_width(self.encoder, self.revision)

    products: ClassVar[tuple[str, ...]] = ("reference",)
    finish_apart: ClassVar[bool] = True

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Merge the shards' statistics, and build the index: both go on where an earlier call was killed."""
        from index import gaussian, joint, neighbours, reference
        from index.copies import local_copy

        output = finished.output
        plan = neighbours.Plan(
            factory=self.index.factory, memory=int(self.index.memory), recall=self.index.recall,
            part_rows=self.index.part_rows, spread=finished.spread,
        )  # fmt: skip
        remote = not output.folder.local
        target = Path(output.folder.path(reference.FOLDER))
        folder = local_copy(output.path) / "building" if remote else target
        moments = (gaussian.Moments.from_arrays(arrays) for arrays in finished.summaries())
        origin = self._origin(output)
        texts: neighbours.Texts | None = None
        if origin.text_encoder is not None:
            texts = partial(self._texts, finished, origin.text_encoder)
        captioned = None
        if self.captions is not None:
            pairs = joint.merge(joint.Pairs.from_arrays(_below("pairs.", each)) for each in finished.summaries())
            captioned = reference.Captioned(lambda: texts_of(finished), pairs)
            if pairs.rows and pairs.texts == pairs.images:
                texts = partial(_sampled_texts, finished, pairs.rows)
        reference.build(
            folder, origin, plan, lambda: shards_of(finished), lambda: moments, texts=texts, captioned=captioned
        )  # fmt: skip
        if remote:
            _upload(folder, output.folder, reference.FOLDER)

    def _texts(self, finished: pipeline.run.driver.Finished, encoder: Mapping[str, str]) -> np.ndarray | None:
        """Embeddings of texts to tune the index on: of captions where the job keeps some."""
        from stages.embed.queries import query_embeddings, sample_captions

        name = next((name for name in CAPTION_NAMES if name in self.keep), None)
        captions: list[str] = []
        if name is not None:
            columns = (table[name].to_pylist() for table in finished.tables([name]))
            captions = sample_captions(columns, int(finished.output.plan["rows"]))
        return query_embeddings(encoder["path"], encoder["revision"] or None, captions, self.allow_pickle)

    def _origin(self, output: Output) -> Origin:
        from index.reference import Origin
        from stages.models import clip

        records = list(output.records())
        digest = hashlib.blake2b("".join(record.checksum for record in records).encode(), digest_size=16)
        text = self.text_encoder or self.encoder

        def identity(path: str, role: clip.Role, revision: str | None) -> dict[str, str]:
            known = clip.identity(path, role, revision, allow_pickle=self.allow_pickle)
            folder = Path(path).expanduser()  # found again from any working directory
            return {**known, "path": str(folder.absolute())} if folder.is_dir() else known

        revision = None if self.text_encoder else self.revision
        speaks = text is not None and (self.text_encoder is not None or clip.has_text_encoder(text, revision))
        return Origin(
            source=digest.hexdigest(),
            shard_rows=[record.rows_ok for record in records],
            dim=self._width(),
            dtype=self.store,
            encoder=identity(self.encoder, "image", self.revision) if self.encoder else None,
            text_encoder=identity(text, "text", revision) if text and speaks else None,
            shrinkage=self.shrinkage,
        )

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        return _CARD.format(output=finished.output.path)

    def panels(self) -> list[Panel]:
        return [
            Panel("Reference", _facts, "What searching and inverting against this dataset rest on."),
            Panel("Norms", _norms, "Cosines ignore the norm of an embedding; decoders do not."),
            Panel("Spread", _spread, "Share of the embeddings' variance along each of their principal axes."),
            Panel("Neighbours", _examples, "Some pictures, one a line, each followed by the nearest others."),
        ]


_CARD = """## Search it

```sh
latentmill search {output} "a red star" --page found.html
```

```python
import torch
from index.reference import Reference

reference = Reference.open("{output}")
z_BE = torch.from_numpy(reference.index.gather([0, 1]))  # embeddings of any norm, one a row: here two of its own
found = reference.neighbours(z_BE, k=2)
found.cos_BK, found.ids, found.vectors_BKE
```

"""


def shards_of(finished: pipeline.run.driver.Finished) -> Iterator[Shard]:
    """The embedded rows of each committed shard, in order."""
    import numpy as np

    from index.reference import Shard

    tables = finished.tables(["id", "status", "embedding"])
    for record, rows in zip(finished.output.records(), tables, strict=True):
        rows_N = np.flatnonzero(rows["status"].to_numpy(zero_copy_only=False) == "ok")
        good = rows.take(rows_N).combine_chunks()
        column = good["embedding"]
        width = column.type.list_size
        flat = np.concatenate([np.asarray(chunk.flatten()) for chunk in column.chunks] or [np.empty(0, np.float32)])
        yield Shard(record.shard, good["id"].to_pylist(), rows_N, flat.reshape(-1, width))


def texts_of(finished: pipeline.run.driver.Finished) -> Iterator[Texts]:
    """The embedded captions of each committed shard, in order; rows are numbered as in `shards_of`."""
    import numpy as np

    from index.captions import Texts

    start = 0
    for rows in finished.tables(["status", "text_embedding"]):
        good = rows.take(np.flatnonzero(rows["status"].to_numpy(zero_copy_only=False) == "ok")).combine_chunks()
        held_N = np.flatnonzero(good["text_embedding"].is_valid().to_numpy(zero_copy_only=False))
        column = good["text_embedding"].take(held_N).combine_chunks()
        flat = np.asarray(column.flatten())
        yield Texts(held_N + start, flat.reshape(len(held_N), column.type.list_size))
        start += len(good)


def _sampled_texts(finished: pipeline.run.driver.Finished, captioned: int) -> np.ndarray:
    """Embedded captions to tune the index on."""
    from stages.embed.queries import sample_rows

    return sample_rows((shard.vectors_NT for shard in texts_of(finished)), captioned)


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _upload(folder: Path, target: Folder, below: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == "reference.json"):  # which says that all is there
        upload = target.begin(f"{below}/{file.relative_to(folder)}")
        with file.open("rb") as source:
            while block := source.read(8 << 20):
                upload.write(block)
        upload.close()


# --- report ----------------------------------------------------------------------------------------------------------


def _facts(view: View) -> Html:

    try:
        opened = _open(view)
    except FileNotFoundError:
        return Html("")
    facts, made = opened.facts, opened.index.facts
    encoder = facts["encoder"]["path"] if facts["encoder"] else "not named"
    recall = ", ".join(f"@{k} {value:.3f}" for k, value in made["recall"].items())
    rate = made["queries_per_second"]
    rows = [
        ["rows", f"{opened.rows:,}"],
        ["width, type", f"{opened.dim}, {facts['dtype']}"],
        ["image encoder", encoder],
        ["text encoder", facts["text_encoder"]["path"] if facts["text_encoder"] else "none: search by picture only"],
        ["mean norm", figure(opened.mean_norm)],
        ["shrinkage", f"{opened.gaussian.shrinkage:.5f}"],
        ["index", f"{made['factory']}, {made['index_bytes'] / 1e6:,.1f} MB"],
        ["lists looked into", made["nprobe"] or "all"],
        ["measured recall", f"{recall} ({made['queries']:,} rows against exact search, own match left out)"],
        ["measured recall of texts", _text_recall(made)],
        ["captions", _captions_told(facts)],
        ["queries a second", f"{rate:,.0f} on the machine that built it" if rate else "not measured"],
    ]
    return table(["", ""], rows)


def _text_recall(made: Mapping[str, Any]) -> str:
    if made["factory"] == "Flat":
        return "1: every vector is compared"
    if "text_recall" not in made:
        return "not measured"
    found = ", ".join(f"@{k} {value:.3f}" for k, value in made["text_recall"].items())
    return f"{found} ({made['text_queries']:,} texts against exact search)"


def _captions_told(facts: Mapping[str, Any]) -> str:
    told = facts.get("captions")
    if not told:
        return "none"
    if not told["captioned"]:
        return "asked for, but no row has one: are the ids of the captions' file those of the rows?"
    without = facts["rows"] - told["captioned"]
    counted = f"{told['captioned']:,} rows, {without:,} have none"
    if told["modality_gap"] is None:
        return counted
    return f"{counted}; modality gap {told['modality_gap']:.3f}, cosine to the own picture {told['matched_cosine']:.3f}"


def _norms(view: View) -> Html:

    return charts.histogram(view.values("norm"), "norm of the embedding")


def _spread(view: View) -> Html:
    import numpy as np
    import torch

    try:
        opened = _open(view)
    except FileNotFoundError:
        return Html("")
    variance_E = torch.linalg.eigvalsh(opened.gaussian.covariance_EE).flip(0).clamp_min(0).numpy()
    share_E = np.cumsum(variance_E) / variance_E.sum()
    rows = [[f"{p:.0%} of the variance", f"{int(np.searchsorted(share_E, p)) + 1} axes"] for p in (0.5, 0.9, 0.99)]
    effective = float(variance_E.sum() ** 2 / (variance_E**2).sum())
    return table(["", ""], [*rows, ["effective dimension (participation ratio)", f"{effective:.1f} of {opened.dim}"]])


def _examples(view: View) -> Html:
    import numpy as np
    import torch

    try:
        opened = _open(view)
    except FileNotFoundError:
        return Html("")
    chosen = np.linspace(0, opened.rows - 1, 4).round().astype(int)
    z_BE = torch.from_numpy(opened.index.gather(chosen))
    found = opened.neighbours(z_BE, min(6, opened.rows))
    groups = []
    for b in range(len(chosen)):
        rows = hits(view.output, opened, found.positions_BK[b], found.cos_BK[b].tolist())
        groups.append([Exhibit(row.picture, row.id, f"cosine {row.cosine:.3f}") for row in rows])
    if all(exhibit.image is None for group in groups for exhibit in group):
        return Html("")
    return escape(gallery(group, 96) for group in groups)


def _open(view: View) -> Any:
    from index.reference import Reference as Opened

    return Opened.open(view.output.path)
