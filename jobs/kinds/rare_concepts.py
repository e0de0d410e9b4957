"""Job ``rare-concepts``: a few pictures of each concept to a corpus of new ones, through the seeds that draw them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jobs.page.amounts import figure, mean
from jobs.page.html import Html, escape, measures, picture, table, tag, words
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.concept_input import allowed, concept_source, folder_of
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from stages.models.names import FolderName
from stages.rare.settings import PlainGuide, RareConceptsSettings, RareDrawing, Score

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.input.source import Source

MEASURES = ("score", "clip_score", "clip_image", "bound", "success", "select_start", "select_loss", "seed_std")
"""Columns whose means stand in the table of methods, where the dataset has them."""
GALLERY_CONCEPTS = 16
GALLERY_PICTURES = 4


class RareConcepts(RowJob, RareDrawing):
    """New pictures of concepts that a frozen Stable Diffusion model rarely draws: the seeds of a few pictures of each
    are interpolated, combined or optimised into new seeds, drawn and scored, and the best kept with seed, parents and
    score.

    A row of the input is a concept: ``prompt``, ``name``, and ``pictures`` (a list), or ``seeds`` (ids in an inversion
    dataset). A folder tree with a ``concept.yaml`` in each concept's folder and its pictures in ``with/`` serves too.
    The output has one row for each concept, method and number below `count`.
    """

    job: Literal["rare-concepts"] = "rare-concepts"
    count: int = Field(10, ge=1)
    """Pictures that are kept of each concept, method and guide."""
    score: tuple[Score, ...] = Field(("text", "image"), min_length=1)
    """What is measured: CLIP similarity to the prompt, to the concept's own pictures, or what the miniature world's
    judge finds (needs the column ``objects``). The first decides between candidates, the next ones between equals."""
    pictures_root: FolderName | None = None
    """Folder that relative picture addresses start from. Left out: the folder of the input's first file."""
    shard_rows: int = Field(500, ge=1)
    """Rows a shard. A shard inverts the pictures of its concepts, so it should hold whole concepts: a multiple of
    `count` times the number of methods and of guides."""

    def source(self) -> Source:
        from dataclasses import replace

        labels = tuple(method.label for method in self.methods)
        numbers = tuple(str(number) for number in range(self.count))
        guides = {"guide": tuple(guide.label for guide in self.guides)} if self.guides else {}
        return replace(concept_source(self.input), variants={"method": labels, **guides, "number": numbers})

    def stage(self) -> StageSpec:
        root = folder_of(self.input.path[0]) if self.pictures_root is None else self.pictures_root
        settings = self.part(RareConceptsSettings, scores=self.score, root=root, allow=allowed(self.input, root))
        return StageSpec.of("stages.rare.stage:RareConcepts", settings)

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        from jobs.kinds.regeneration import lines
        from stages.models.families import read_geometry

        plain = next((guide.label for guide in self.drawn if isinstance(guide, PlainGuide)), None)
        shown = "No picture was drawn by its prompt alone, so no seed draws its picture in plain diffusers."
        if plain is not None:
            shown = lines(
                read_geometry(self), finished.output, steps=self.steps, guidance=self.guidance,
                negative=self.negative, guide=plain if self.guides else None,
            )  # fmt: skip
        return _CARD.format(lines=shown, score=self.score[0])

    def redraws(self, row: Mapping[str, Any]) -> bool:
        plain = [guide.label for guide in self.drawn if isinstance(guide, PlainGuide)]
        return bool(plain) and (not self.guides or row["guide"] in plain)

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

    columns = [name for name in MEASURES if name in view.columns]
    rows = view.rows([*_told_apart(view), *columns], 20_000)
    labels = list(_labels(view))
    own = [[row for row in rows if _label(row) == label] for label in labels]
    counted: dict[str, list[float | None]] = {"rows": [len(one) for one in own]}
    return measures(labels, counted | {name: [mean(row[name] for row in one) for one in own] for name in columns})


def _draw_concepts(view: View) -> Html:
    """A table a concept: its own pictures, and a line a method with its best ones."""

    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    columns = ["concept", "prompt", *_told_apart(view), "image", "references", "score"]
    most = GALLERY_CONCEPTS * len(_labels(view)) * int(view.config.get("count", 1))
    for row in view.rows(columns, min(most, 4000), spread=False):
        found.setdefault(row["concept"], {}).setdefault(_label(row), []).append(row)
    blocks = []
    for name, methods in list(found.items())[:GALLERY_CONCEPTS]:
        shown = next((row["references"] for own in methods.values() for row in own if row["references"]), None)
        lines = []
        for label, own in methods.items():
            best = sorted(own, key=lambda row: -row["score"])[:GALLERY_PICTURES]
            scores = [tag("figcaption", figure(row["score"], "score")) for row in best]
            drawn = [tag("figure", picture(r["image"], 96, label), s) for r, s in zip(best, scores, strict=True)]
            lines.append([label, *drawn, *[""] * (GALLERY_PICTURES - len(drawn))])
        prompt = next(iter(methods.values()))[0]["prompt"]
        sheet = tag("figure", picture(shown, 192, "references"), tag("figcaption", "its pictures")) if shown else None
        head = ["method", "best", *[""] * (GALLERY_PICTURES - 1)]
        blocks.append([tag("h3", words(name, 60)), tag("p", words(prompt), class_="quiet"), sheet, table(head, lines)])
    return escape(blocks)


def _labels(view: View) -> list[str]:
    """What rows are told apart by: methods, with each guide where there are any."""
    methods, guides = (
        [one.get("name") or one["method"] for one in view.config.get(name) or ()] for name in ("methods", "guides")
    )
    return [f"{method}, {guide}" for method in methods for guide in guides] or methods


def _label(row: dict[str, Any]) -> str:
    return ", ".join(row[name] for name in ("method", "guide") if name in row)


def _told_apart(view: View) -> list[str]:
    return [name for name in ("method", "guide") if name in view.columns]
