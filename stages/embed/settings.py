"""How embeddings are made, or taken over: the settings of both stages. Plain models; nothing heavy is imported."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.contract import Settings, added, renamed, speed
from stages.models.names import ModelName


class StoredEmbeddings(Settings):
    """Whose embeddings they are, and how they are stored."""

    encoder: ModelName | None = None
    """Folder or hub id of a CLIP, OpenCLIP (converted) or SigLIP model, or of a pipeline with an image encoder."""
    revision: str | None = None
    """Of the encoder on the hub: branch, tag or commit."""
    allow_pickle: bool | None = added()
    """Read weights that are there as pickles (``.bin``) alone. A pickle can run anything on the machine that reads
    it."""
    store: Literal["float16", "float32"] = Field("float32", **renamed("dtype", to="store"))
    """How embeddings are stored."""


class ComputedEmbeddings(StoredEmbeddings):
    """How they are made."""

    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the encoder computes in; ``float16`` on a GPU."""
    batch_size: int | None = speed(None, ge=1)
    """Pictures a batch. Left out: found from the device's memory."""
    threads: int = speed(2, ge=1)
    """Threads a worker that prepare pictures for the encoder."""


class Captions(Settings):
    """Where the captions of the pictures are. ``true`` stands for the input's own; a path for that of a second file."""

    path: str | None = None
    """A second file, Parquet, CSV or JSONL, with a caption for each id. Left out: the input's columns ``prompt``,
    ``text`` and ``caption``, the first that holds a text."""
    id: str = "id"
    """The second file's column with the ids of the input's rows."""
    prompt: str = "prompt"
    """The second file's column with the captions."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if value is True:
            return {}
        return {"path": value} if isinstance(value, str) else value


class CaptionSettings(Captions):
    """Captions, and what embeds them."""

    encoder: ModelName
    """Folder or hub id of the text encoder."""
    revision: str | None = None
    """Of it on the hub."""


class EmbedSettings(ComputedEmbeddings):
    """Pictures to embeddings."""

    encoder: ModelName
    """There is no embedding without one."""
    captions: CaptionSettings | None = added()
    """Embed the pictures' captions too."""


class AdoptSettings(StoredEmbeddings):
    """Embeddings that were made elsewhere."""

    dim: int = Field(ge=1)
    """Width that every embedding must have."""
    captions: CaptionSettings | None = added()
    """Embed the pictures' captions too."""
