"""Inverters and their use: everything that the jobs `train-inverter` and `invert-text` can be told. Plain models;
nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from pipeline.contract import Settings, renamed
from stages.models.names import FolderName
from stages.models.settings import LatentModelSettings


class Network(Settings):
    """The inverter's size."""

    patch: int = Field(2, ge=1)
    """Side of a patch, in latent pixels."""
    width: int = Field(256, ge=8)
    """Width of the transformer."""
    layers: int = Field(6, ge=1)
    """Its layers."""
    heads: int = Field(8, ge=1)
    """Its attention heads."""


class Training(Settings):
    """How the inverter is trained."""

    steps: int = Field(10_000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(64, ge=1, **renamed("batch", to="batch_size"))
    """Pictures in each."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW; 5 % of the steps warm up, the rest follows a cosine to zero."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    noise_weight: float = Field(0.1, ge=0)
    """Weight of the noise-prediction loss under the inverted text latent."""
    noise_rows: int = Field(16, ge=0)
    """Pictures of each batch that it is measured on; 0 turns it off."""
    held_out: float = Field(0.05, gt=0, lt=1)
    """Share of the pictures kept for the final measures."""


class BatchSettings(LatentModelSettings):
    """What both stages take: one frozen model, and how many pictures go through it at once."""

    batch_size: int = Field(16, ge=1, **renamed("batch", to="batch_size"))
    """Pictures in one pass."""


class DrawPairsSettings(BatchSettings):
    """How the pictures are drawn that an inverter is trained on."""

    steps: int = Field(30, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=1)
    """Guidance scale of the pictures."""
    seed: int = Field(0, ge=0)
    """A picture's noise is drawn from (seed, id)."""


class InvertTextSettings(BatchSettings):
    """Which inverter reads which pictures."""

    inverter: FolderName
    """Output folder of a ``train-inverter`` job on the same model."""
    image: str = "image"
    """Column with the picture."""
