"""Which decoder draws, and how. Plain models; nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from pipeline.contract import Settings, added
from stages.models.decoding import Decode
from stages.models.names import ModelName


class IPAdapter(Settings):
    """What makes Stable Diffusion take an image embedding (Ye et al., 2023)."""

    path: ModelName
    """Its ``.safetensors`` file, or ``org/name/folder/file.safetensors`` on the hub. The plain kind takes one projected
    embedding, Plus the penultimate hidden states of all tokens (``store_states: penultimate`` of ``invert-prompts``,
    ``columns: {embedding: states}``); FaceID takes other things."""
    scale: float = Field(1.0, ge=0)
    """How much it says beside the (empty) prompt."""


class Decoding(Decode):
    """Pictures by Kandinsky 2.2, Stable unCLIP, Stable Cascade, or Stable Diffusion 1.5 or XL with an IP-Adapter."""

    model: ModelName
    """Folder or hub id of the pipeline; its ``model_index.json`` says which of them it is."""
    noise_level: int | None = Field(None, ge=0)
    """Stable unCLIP: steps of noise that the embedding is given, for more variation. Left out: 0."""
    prior: ModelName | None = added()
    """For Stable Cascade, and only there: folder or hub id of its prior pipeline, which is what takes the embedding,
    ``steps``, ``guidance`` and ``size``; the decoder goes on from the prior's latent with its own ten steps."""
    ip_adapter: IPAdapter | None = None
    """For Stable Diffusion, and only there."""


class EmbeddingDecoding(Settings):
    """Embeddings to pictures."""

    encoder: ModelName | None = None
    """Folder or hub id with the image encoder of the embeddings. The guidance of Kandinsky and of an IP-Adapter Plus
    contrasts with what it makes of an all-zero picture; the others need none."""
    revision: str | None = None
    """Of the encoder on the hub: branch, tag or commit."""
    allow_pickle: bool | None = None
    """Read weights that are there as pickles (``.bin``) alone. A pickle can run anything on the machine that reads
    it."""
    decode: Decoding


class DecodeSettings(EmbeddingDecoding):
    """What the stage is told."""

    seed: int = 0
