"""How new noise is grown from the noise of a concept's pictures, and how it is drawn and ranked: everything that the
stage and the job `rare-concepts` can be told. Plain models; nothing heavy is imported.

`stages.rare.noise` and `stages.rare.seed_select` hold the formulas, `stages.rare.candidates` applies them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.contract import Settings, added, renamed, speed
from stages.engine.methods import Method, Methods
from stages.inversion.settings import AnyInversionMethod, LboMethod
from stages.models.names import FolderName, ModelName
from stages.models.settings import SamplingSettings

Score = Literal["text", "image", "oracle"]


class NoiseMethod(Method):
    """Base of all methods that make new noise."""

    @property
    def start_method(self) -> NoiseMethod:
        """The method that grows the first noise: itself, unless it only improves another's."""
        return self


class RandomMethod(NoiseMethod):
    """Plain Gaussian seeds: what the model draws of the prompt alone. The baseline; needs no pictures."""

    method: Literal["random"] = "random"


class Blend(Settings):
    """What of a grown seed is kept."""

    low: float = Field(0.25, gt=0, lt=1)
    """Frequencies up to this share of the highest, along both axes; the others are fresh noise."""


class GrownMethod(NoiseMethod):
    """Base of the methods that mix the concept's seeds."""

    blend: Blend | None = added()
    """``{low: 0.25}``: new seeds share the low frequencies alone with the concept's, so that variety is not lost. Left
    out: all of them."""


class SlerpMethod(GrownMethod):
    """Spherical interpolation between two of the concept's seeds, drawn at random."""

    method: Literal["slerp"] = "slerp"
    margin: float = Field(0.2, ge=0, lt=0.5)
    """Positions are drawn from (margin, 1 - margin): at an end the picture is one of the concept's own again."""


class LinearMethod(GrownMethod):
    """Linear combinations of all the concept's seeds, weights uniform on the simplex, made Gaussian again in closed
    form (COG)."""

    method: Literal["linear"] = "linear"


class NaoMethod(GrownMethod):
    """Points on norm-aware paths from the concept's norm-aware centroid to its seeds (NAO)."""

    method: Literal["nao"] = "nao"
    points: int = Field(50, ge=3)
    """Points a path."""
    iterations: int = Field(2000, ge=1, **renamed("updates", to="iterations"))
    """Most Adam updates of centroid and paths; they end earlier when the objective stands still."""
    margin: float = Field(0.2, ge=0, lt=0.5)
    """Positions are drawn from (0, 1 - margin), 0 being the centroid and 1 a seed of the concept: near a seed that is
    shorter or longer than a Gaussian one a path swings about the shell."""


class SeedSelectMethod(NoiseMethod):
    """Seeds optimised through the whole sampler until their picture is near the concept's pictures (SeedSelect)."""

    method: Literal["seed-select"] = "seed-select"
    start: Literal["random", "slerp", "linear", "nao"] = "random"
    """Where the seed starts: a method with its default settings."""
    iterations: int | None = Field(None, ge=1)
    """AdamW updates. Left out: 30 from a random seed, 5 from another, as published."""
    lr: float | None = Field(None, gt=0, **renamed("rate", to="lr"))
    """AdamW's rate, a tenth of it after three updates. Left out: 0.1 from a random seed, 0.05 from another."""
    steps: int | None = Field(None, ge=3)
    """Sampling steps while optimising; fewer are cheaper. Left out: the job's."""

    @property
    def start_method(self) -> NoiseMethod:
        return GROWING[self.start]()

    @property
    def budget(self) -> tuple[int, float]:
        """Iterations and learning rate."""
        fresh = self.start == "random"
        return self.iterations or (30 if fresh else 5), self.lr or (0.1 if fresh else 0.05)


GROWING: dict[str, type[NoiseMethod]] = {
    "random": RandomMethod,
    "slerp": SlerpMethod,
    "linear": LinearMethod,
    "nao": NaoMethod,
}
"""The methods that need no start from another."""

AnyNoiseMethod = Annotated[
    RandomMethod | SlerpMethod | LinearMethod | NaoMethod | SeedSelectMethod, Field(discriminator="method")
]


class Guide(Method):
    """Base of all rules by which a picture is drawn of a seed; they go with every method of new seeds."""


class PlainGuide(Guide):
    """The prompt alone."""

    method: Literal["plain"] = "plain"


class R2fGuide(Guide):
    """The prompt and the row's ``anchor`` in turn, then the prompt alone (R2F); takes no more passes."""

    method: Literal["r2f"] = "r2f"
    until: float = Field(0.5, gt=0, le=1)
    """Share of the steps, from the noise on, in which prompts alternate."""
    every: int = Field(2, ge=1)
    """The anchor is shown in one of so many steps; 1: in all of them until then."""


class AapbGuide(Guide):
    """Scores of the prompt and of the row's ``anchor``, blended (AAPB); half as many passes again."""

    method: Literal["aapb"] = "aapb"
    g: float | None = Field(None, ge=0, le=1)
    """Weight of the anchor. Left out: the closed form, anew at each step, for models guided by a negative prompt."""


class ComposeGuide(Guide):
    """The scores of the row's ``parts`` added to the prompt's (composable diffusion): texts of one attribute each, or
    pairs [with it, without it], of which the difference is added; one more pass a text."""

    method: Literal["compose"] = "compose"
    whole: float = Field(1.0, ge=0)
    """Weight of the whole prompt."""
    weight: float = Field(1.0, gt=0)
    """Weight of each part."""


AnyGuide = Annotated[PlainGuide | R2fGuide | AapbGuide | ComposeGuide, Field(discriminator="method")]


class Anchors(Settings):
    """Where anchors are found that the rows do not name. A plain path stands for ``{reference: ...}``."""

    reference: FolderName
    """Output of a ``reference`` run with captions that keeps their texts (``keep: [caption]``)."""
    min_rows: int = Field(20, ge=1, **renamed("least", to="min_rows"))
    """Rows that have a caption, from which on it is frequent."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"reference": value} if isinstance(value, str) else value


class RareDrawing(SamplingSettings):
    """What a job file calls by the same names as the stage."""

    methods: Methods[AnyNoiseMethod]
    """How new seeds are made; a plain string stands for ``{method: ...}``. Each makes `count` rows a concept."""
    guides: Methods[AnyGuide] | None = added()
    """By what each seed is drawn: ``plain``, ``r2f``, ``aapb``, ``compose``; each makes `count` rows a concept and
    method. Left out: by the prompt alone."""
    anchors: Anchors | None = added()
    """Where the anchor of a row that names none is found: the nearest frequent caption that keeps the rest of the
    prompt. Left out: rows name theirs."""
    candidates: int = Field(1, ge=1)
    """Pictures that are drawn for each one kept; the best by `score` stays."""
    encoder: ModelName = Field("micro:prior", **renamed("clip", to="encoder"))
    """CLIP-family model that scores and that ``seed-select`` follows: a folder or hub id."""
    encoder_revision: str | None = Field(None, **renamed("clip_revision", to="encoder_revision"))
    """Of that model on the hub."""
    oracle: ModelName | None = None
    """Folder of the oracle. Left out: the shipped one."""
    inversion: AnyInversionMethod = LboMethod()
    """How the concepts' pictures become seeds: a method of ``invert-images`` that needs a seed alone."""
    seeds: FolderName | None = None
    """Output of an ``invert-images`` run with one method, for concepts whose row has no pictures."""
    by: str = "concept"
    """Its column with the concepts' names (``keep`` it there)."""
    max_pictures: int = Field(16, ge=1, **renamed("most", to="max_pictures"))
    """Pictures (or seeds) of a concept that are used: the first so many."""
    steps: int = Field(50, ge=1)
    """Sampling steps, of inversion and drawing."""
    guidance: float = Field(7.5, ge=1)
    """Guidance scale of drawing. Pictures are inverted without guidance."""
    negative: str | None = None
    """Negative prompt, under guidance."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Pictures of another shape: the middle square, white borders, or both sides resized."""
    store: Literal["float32", "float16"] = "float32"
    """dtype of stored latents. Pictures are drawn from the stored numbers."""
    slots: int | None = speed(None, ge=1)
    """Pictures at once. Left out: as many as the GPU's free memory takes, 64 at most; 16 on a CPU."""

    @field_validator("inversion", mode="before")
    @classmethod
    def _short_inversion(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _in_so_many_steps(self) -> RareDrawing:
        object.__setattr__(self, "inversion", self.inversion.within(self.steps))
        return self

    @model_validator(mode="after")
    def _noise_alone(self) -> RareDrawing:
        if self.inversion.extra is not None:
            raise ValueError(f"inversion: {self.inversion.label} needs more than a seed; take lbo or a fixed point")
        return self

    @model_validator(mode="after")
    def _nothing_recorded(self) -> RareDrawing:
        if self.accelerate == "graph":
            raise ValueError("accelerate: graph records steps of inverting, and this job mostly draws: take compile")
        return self

    @property
    def drawn(self) -> tuple[Guide, ...]:
        """The guides, the prompt alone where none is named."""
        return self.guides or (PlainGuide(),)


class RareConceptsSettings(RareDrawing):
    """All that the stage is told."""

    scores: tuple[Score, ...] = Field(("text", "image"), min_length=1)
    """What is measured; the first decides which candidate is kept, the next ones between equals."""
    root: str = ""
    """Folder that relative picture addresses start from, and that addresses may lie in."""
    allow: tuple[str, ...] | None = added()
    """Further folders and beginnings of addresses that pictures may lie below."""
    seed: int = Field(0, ge=0)
    """Everything random is drawn from (seed, concept, number): all methods start from the same noise."""

    @property
    def follows_pictures(self) -> bool:
        """Whether the CLIP direction of a concept's pictures is needed."""
        return "image" in self.scores or any(isinstance(method, SeedSelectMethod) for method in self.methods)
