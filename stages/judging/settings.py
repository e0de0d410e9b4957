"""How corpora are judged: everything that the job `judge-corpus` and its stage can be told. Plain models."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.contract import Settings, renamed, speed
from stages.models.names import DeviceName

REAL = "real"
"""What the training on real pictures alone is called."""
HELD_OUT = "input"
"""The job file's key for the pictures that classifiers are judged by."""
LIBRARIES = ("torchvision", "timm")


def _network(name: str) -> str:
    library, _, model = name.partition("/")
    if name == "small" or (library in LIBRARIES and re.fullmatch(r"\w[\w.-]*", model)):
        return name
    raise ValueError(f"no classifier is called {name!r}: small, torchvision/NAME or timm/NAME")


class Judging(Settings):
    """What a job file calls by the same names as the stage."""

    labels: tuple[str, ...] = Field(("label",), min_length=1)
    """Columns with a picture's labels. Of several each is predicted by a head of its own, a picture's class is all of
    them, and it counts as right when all are. In a folder of pictures without such columns: the names of the
    folders that a picture lies in, the innermost last."""
    classifier: Annotated[str, AfterValidator(_network)] = "small"
    """``small``: a convolutional network of our own with four layers. ``torchvision/NAME``, ``timm/NAME``: a model of
    that library, which has to be installed. All are trained from nothing."""
    size: int = Field(64, ge=8)
    """Side in pixels that pictures are brought to: the middle square, resized."""
    epochs: int = Field(30, ge=1)
    """Passes over the training pictures."""
    batch_size: int = Field(64, ge=2, **renamed("batch", to="batch_size"))
    """Pictures a step."""
    lr: float = Field(0.003, gt=0, **renamed("rate", to="lr"))
    """AdamW's highest rate; it rises to it in the first tenth of the steps, and falls along a cosine."""
    flip: bool = True
    """Show half of the pictures mirrored, left for right. ``false`` where that changes what they are."""
    rare: int = Field(20, ge=0)
    """A class of which `real` holds at most so many pictures is rare; one that it does not hold has never been seen."""
    added: int | None = Field(None, ge=1)
    """Pictures of a corpus that are added to the real ones, the same number for all. Left out: as many as the smallest
    corpus has. A larger one is drawn from at random, a smaller one repeated; real pictures alone are repeated to the
    same sum, so that all trainings take as many steps."""
    device: DeviceName = speed("auto")
    """``cpu``, ``cuda``; ``auto``: a GPU where there is one."""


class JudgeCorpusSettings(Judging):
    """All that the stage is told. Sets of pictures are `pipeline.input.source.Source` as JSON."""

    held_out: dict[str, Any]
    """The pictures that are judged by."""
    real: dict[str, Any]
    """Those that every classifier is trained on."""
    corpora: dict[str, dict[str, Any]]
    """Name -> those that a classifier is trained on beside them."""
    seed: int = Field(0, ge=0)
    """Everything random is drawn from (seed, trial), so that all corpora meet the same weights and the same order."""

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """All of them, by the keys that the job file calls them by."""
        corpora = {key_of(name): given for name, given in self.corpora.items()}
        return {HELD_OUT: self.held_out, REAL: self.real, **corpora}


def key_of(corpus: str) -> str:
    """What the job file calls a row's corpus."""
    return corpus if corpus == REAL else f"corpora.{corpus}"
