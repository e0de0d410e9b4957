"""Job ``rare-concepts``: a few pictures of each concept to a corpus of new ones, through the seeds that draw them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

import micro
from jobs.schema.base import JobBase
from jobs.schema.concept_input import concept_source, folder_of
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from stages.engine.methods import Methods
from stages.inversion.settings import AnyInversionMethod, BelmMethod, EdictMethod, LboMethod, NullTextMethod
from stages.models.names import ModelName
from stages.models.settings import LatentModelSettings
from stages.rare.settings import AnySeedMethod

if TYPE_CHECKING:
    from jobs.page.html import Html
    from jobs.page.view import View
    from pipeline.input.source import Source

MEASURES = ("score", "clip_score", "clip_image", "bound", "success", "select_start", "select_loss", "seed_std")
"""Columns whose means stand in the table of methods, where the dataset has them."""
GALLERY_CONCEPTS = 16
GALLERY_PICTURES = 4


class RareConcepts(JobBase):
    """New pictures of concepts that a frozen Stable Diffusion model rarely draws: the seeds of a few pictures of each
    are interpolated, combined or optimised into new seeds, drawn and scored, and the best kept with seed, parents and
    score.

    A row of the input is a concept: ``prompt``, ``name``, and ``pictures`` (a list), or ``seeds`` (ids in an inversion
    dataset). A folder tree with a ``concept.yaml`` in each concept's folder and its pictures in ``with/`` serves too.
    The output has one row for each concept, method and number below `count`.
    """

    job: Literal["rare-concepts"] = "rare-concepts"
    model: ModelName = str(micro.MODELS / "stable-diffusion")
    """Stable Diffusion 1.x, 2.x or XL: a diffusers folder or hub id. Left out: the miniature one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Of the weight files, for instance ``fp16``."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the networks; latents stay float32."""
    device: str = "auto"
    """``cpu``, ``cuda``, ... ``auto`` takes the GPU where there is one."""
    methods: Methods[AnySeedMethod]
    """How new seeds are made; a plain string stands for ``{method: ...}``. Each makes `count` rows a concept."""
    count: int = Field(10, ge=1)
    """Pictures that are kept of each concept and method."""
    candidates: int = Field(1, ge=1)
    """Pictures that are drawn for each one kept; the best by `score` stays."""
    score: tuple[Literal["text", "image", "oracle"], ...] = Field(("text", "image"), min_length=1)
    """What is measured: CLIP similarity to the prompt, to the concept's own pictures, or what the miniature world's
    judge finds (needs the column ``objects``). The first decides between candidates, the next ones between equals."""
    clip: ModelName = str(micro.MODELS / "prior")
    """CLIP-family model that scores and that ``seed-select`` follows: a folder or hub id."""
    clip_revision: str | None = None
    """Of that model on the hub."""
    oracle: str | None = None
    """Folder of the oracle. Left out: the shipped one."""
    inversion: AnyInversionMethod = LboMethod()
    """How the concepts' pictures become seeds: a method of ``invert-images`` that needs a seed alone."""
    seeds: str | None = None
    """Output of an ``invert-images`` run with one method, for concepts whose row has no pictures."""
    by: str = "concept"
    """Its column with the concepts' names (``keep`` it there)."""
    most: int = Field(16, ge=1)
    """Pictures (or seeds) of a concept that are used: the first so many."""
    steps: int = Field(50, ge=1)
    """Sampling steps, of inversion and drawing."""
    guidance: float = Field(7.5, ge=1)
    """Guidance scale of drawing. Pictures are inverted without guidance."""
    negative: str | None = None
    """Negative prompt, under guidance."""
    size: int | None = Field(None, ge=8)
    """Side of the pictures in pixels; the model's own when left out."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Pictures of another shape: the middle square, white borders, or both sides resized."""
    pictures_root: str | None = None
    """Folder that relative picture addresses start from. Left out: the folder of the input's first file."""
    store: Literal["float32", "float16"] = "float32"
    """dtype of stored latents. Pictures are drawn from the stored numbers."""
    slots: int = Field(16, ge=1)
    """Pictures at once."""
    shard_rows: int = Field(500, ge=1)
    """Rows a shard. A shard inverts the pictures of its concepts, so it should hold whole concepts: a multiple of
    `count` times the number of methods."""

    @field_validator("inversion", mode="before")
    @classmethod
    def _short_inversion(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> RareConcepts:
        if isinstance(self.inversion, BelmMethod | EdictMethod | NullTextMethod) or (
            isinstance(self.inversion, LboMethod) and self.inversion.replay
        ):
            raise ValueError(f"inversion: {self.inversion.label} needs more than a seed; take lbo or a fixed point")
        return self

    def source(self) -> Source:
        from dataclasses import replace

        labels = tuple(method.label for method in self.methods)
        numbers = tuple(str(number) for number in range(self.count))
        return replace(concept_source(self.input), variants={"method": labels, "number": numbers})

    def stage(self) -> StageSpec:
        names = (
            "model", "revision", "variant", "dtype", "device", "seeds", "by", "steps", "guidance", "negative", "size",
            "fit", "clip", "clip_revision", "oracle", "candidates", "most", "store", "slots", "seed",
        )  # fmt: skip
        return StageSpec(
            "stages.rare.stage:RareConcepts",
            {
                "methods": [method.model_dump(mode="json") for method in self.methods],
                "inversion": self.inversion.model_dump(mode="json"),
                "scores": list(self.score),
                "root": folder_of(self.input.path[0]) if self.pictures_root is None else self.pictures_root,
            }
            | {name: getattr(self, name) for name in names},
        )

    def card(self) -> str:
        from jobs.kinds.regeneration import lines
        from stages.models.families import read_geometry

        geometry = read_geometry(LatentModelSettings(model=self.model, revision=self.revision, size=self.size))
        shown = lines(geometry, steps=self.steps, guidance=self.guidance, negative=self.negative)
        return _CARD.format(lines=shown, score=self.score[0])

    def panels(self) -> list[Panel]:
        note = "Means over the pictures that were kept."
        return [
            Panel("Methods of new seeds", _draw_methods, note),
            Panel("Concepts", _draw_concepts, "The concept's own pictures, then new ones by method; score beneath."),
        ]


_CARD = """## From a row back to its picture

{lines}

`score` is the measure that candidates were ranked by (`{score}`): `ORDER BY concept, score DESC` gives the best of each
concept. `parents` names the pictures a seed was grown from and what each counted for.

"""


def _draw_methods(view: View) -> Html:
    from jobs.page.html import table

    columns = [name for name in MEASURES if name in view.columns]
    rows = view.rows(["method", *columns], 20_000)
    lines = []
    for label in _labels(view):
        own = [row for row in rows if row["method"] == label]
        means: list[Any] = [label, len(own)]
        for name in columns:
            values = [float(row[name]) for row in own if row[name] is not None]
            means.append(f"{sum(values) / len(values):.4g}" if values else "")
        lines.append(means)
    return table(["method", "rows", *(name.replace("_", " ") for name in columns)], lines, range(1, len(columns) + 2))


def _draw_concepts(view: View) -> Html:
    """A table a concept: its own pictures, and a line a method with its best ones."""
    from jobs.page.html import escape, picture, table, tag, words

    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    columns = ["concept", "prompt", "method", "image", "references", "score"]
    most = GALLERY_CONCEPTS * len(_labels(view)) * int(view.config.get("count", 1))
    for row in view.rows(columns, min(most, 4000), spread=False):
        found.setdefault(row["concept"], {}).setdefault(row["method"], []).append(row)
    blocks = []
    for name, methods in list(found.items())[:GALLERY_CONCEPTS]:
        shown = next((row["references"] for own in methods.values() for row in own if row["references"]), None)
        lines = []
        for label, own in methods.items():
            best = sorted(own, key=lambda row: -row["score"])[:GALLERY_PICTURES]
            scores = [tag("figcaption", f"{row['score']:.3g}") for row in best]
            drawn = [tag("figure", picture(r["image"], 96, label), s) for r, s in zip(best, scores, strict=True)]
            lines.append([label, *drawn, *[""] * (GALLERY_PICTURES - len(drawn))])
        prompt = next(iter(methods.values()))[0]["prompt"]
        sheet = tag("figure", picture(shown, 192, "references"), tag("figcaption", "its pictures")) if shown else None
        head = ["method", "best", *[""] * (GALLERY_PICTURES - 1)]
        blocks.append([tag("h3", words(name, 60)), tag("p", words(prompt), class_="quiet"), sheet, table(head, lines)])
    return escape(blocks)


def _labels(view: View) -> list[str]:
    return [method.get("name") or method["method"] for method in view.config.get("methods", ())]
