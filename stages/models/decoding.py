"""How embeddings are decoded: the settings of `stages.models.kandinsky`. Plain models; nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from pipeline.contract import Settings, renamed
from stages.models.names import ModelName


class Decode(Settings):
    """Pictures by Kandinsky 2.2's decoder."""

    model: ModelName = "micro:decoder"
    """Folder or hub id of the decoder pipeline."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    steps: int = Field(50, ge=1)
    """Denoising steps."""
    guidance: float = Field(4.0, ge=0)
    """Guidance scale."""
    size: int | None = Field(None, ge=8)
    """Side of the pictures in pixels. Left out: the model's own."""
    batch_size: int = Field(16, ge=1, **renamed("batch", to="batch_size"))
    """Pictures at once."""
