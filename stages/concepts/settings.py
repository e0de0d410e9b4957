"""How words are learned for concepts: everything that the stage and the job `learn-concepts` can be told. Plain models;
nothing heavy is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.contract import Settings, added, renamed, speed
from stages.concepts.templates import Named, checked
from stages.models.names import FolderName
from stages.models.settings import LatentModelSettings


class LegoSettings(Settings):
    """How words are learned. The paper publishes none of these numbers."""

    steps: int = Field(3000, ge=1)
    """Most steps a concept makes; a multiple of `window`."""
    pictures: int = Field(4, ge=1)
    """Pictures a concept and step, half of them without the concept."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate of AdamW, on the new words alone."""
    separation: bool = True
    """Subject separation. Off: only pictures with the concept, as in textual inversion."""
    context: Literal["paper", "normalised", "none"] = "normalised"
    """Form of the context loss: raw dot products, cosines over a temperature (ReVersion's), or none."""
    templates: Annotated[Named | tuple[str, ...] | None, BeforeValidator(checked)] = added()
    """Texts with one `{}`, where the prompt goes without a "photo of a" of its own; one is drawn for each picture of
    each step. `object` and `style` are textual inversion's (Gal et al., 2022). Left out: the prompts as they are."""
    flip: bool | None = added()
    """Mirror each picture of each step with a chance of 1/2, as textual inversion's script does. Not for concepts that
    have a left and a right."""
    posterior: Literal["mean", "sample"] | None = added()
    """Learn from the mean of the autoencoder's posterior (also when left out), or from a new sample of it at each step,
    as textual inversion's script does."""
    context_weight: float = Field(0.01, ge=0)
    """Weight of the context loss."""
    temperature: float = Field(0.07, gt=0)
    """Of the normalised form."""
    skew: float = Field(0.0, ge=0, le=1)
    """Draw noisy timesteps more often: 0 is uniform, ReVersion's importance sampling is 0.5."""
    window: int = Field(100, ge=1)
    """Steps over which losses are averaged for the curve and for stopping."""
    tolerance: float = Field(0.0, ge=0)
    """Smallest gain of a window's loss, as a share, that counts as progress."""
    patience: int | None = Field(None, ge=1)
    """Windows without progress after which a concept stops. Left out: all steps are made."""

    @model_validator(mode="after")
    def _fits(self) -> LegoSettings:
        if self.steps % self.window:
            raise ValueError(f"steps ({self.steps}) is no multiple of window ({self.window})")
        if self.separation and self.pictures % 2:
            raise ValueError(f"pictures ({self.pictures}) is odd: half of them show the subject without the concept")
        return self


class Templates(Settings):
    """Prompts of the training pictures, with ``{subject}`` and ``{concept}``; a row's own replace them.

    The first two are Lego's own (section 3), the third is textual inversion's.
    """

    without: str = "Photo of a {subject}"
    """Pictures without the concept."""
    with_: str = "Photo of a {subject} that is {concept}"
    """Pictures with it."""
    plain: str = "Photo of a {concept}"
    """Pictures with it, when there is no subject separation."""


class Samples(Settings):
    """Pictures of each learned concept on new subjects, for the report."""

    subjects: tuple[str, ...] = Field(min_length=1)
    """Nouns that take the subject's place."""
    prompt: str | None = None
    """With ``{subject}`` and ``{concept}``; the concept's own prompt when left out."""
    draws: int = Field(2, ge=1, **renamed("count", to="draws"))
    """Pictures a subject."""
    steps: int = Field(30, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=1)
    """Guidance scale."""


class ConceptLearning(LatentModelSettings):
    """What a job file calls by the same names as the stage."""

    samples: Samples | None = None
    """Left out: no sample pictures."""
    slots: int | None = speed(None, ge=1)
    """Concepts in one batch; each brings `learning.pictures` pictures a step. Left out: as many as the GPU's free
    memory takes, 64 at most; 8 on a CPU."""
    max_words: int = Field(4, ge=1)
    """Most new words a concept has, subjects included: the height of the column ``embeddings``."""
    checkpoint_seconds: float = speed(120.0, ge=0)
    """A killed worker loses at most so much of the concepts in flight."""


class LearnConceptsSettings(ConceptLearning):
    """All that the stage is told."""

    settings: LegoSettings = LegoSettings()
    templates: Templates = Templates()
    inverter: FolderName | None = None
    """Folder of a trained inverter that gives each word a start near what its pictures invert to."""
    seed: int = Field(0, ge=0)
    """The job's seed."""
    root: str = ""
    """Folder that relative picture addresses start from, and that addresses may lie in."""
    allow: tuple[str, ...] | None = added()
    """Further folders and beginnings of addresses that pictures may lie below."""
    checkpoints: str | None = speed(None)
    """Folder for checkpoints of concepts in flight. Left out: no checkpoints."""
