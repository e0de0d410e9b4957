"""How a corpus is chosen. Plain models; nothing heavy is imported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.contract import Settings, added
from stages.embed.settings import EmbedSettings
from stages.models.names import FolderName


class SelectionSettings(Settings):
    """Which candidates of a class are kept."""

    count: int = Field(100, ge=1)
    """Pictures that are kept of each class, at most."""
    variety: Literal["farthest", "dpp"] = "farthest"
    """How those that differ are found in the encoder's space. ``farthest``: each time the one that is least like its
    nearest kept one. ``dpp``: each time the one that enlarges the determinant of the kept ones' similarities most."""
    share: float = Field(0.5, gt=0, le=1)
    """Of a class's candidates, the best by score that variety chooses among; never fewer than `count`. 1: all."""
    min_score: float | None = None
    """Candidates below it are not kept, however few there are."""
    near: float = Field(0.995, ge=-1, le=1)
    """A candidate whose cosine to a kept one is so high shows the same again. Its scale is the encoder's."""
    copy_cosine: float = Field(0.98, ge=-1, le=1)
    """One whose cosine to a picture of `against` is so high is a copy of it."""


class EmbedCandidatesSettings(EmbedSettings):
    """Pictures to embeddings, and what they are compared with."""

    against: FolderName | None = added()
    """Output of a `reference` run with the same encoder, over the pictures that candidates must not copy: those that
    they were grown from, or a test set."""
