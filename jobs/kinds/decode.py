"""Job ``decode``: image embeddings, our own or somebody else's, to pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jobs.page.html import Html, picture, table
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from stages.decode.settings import DecodeSettings, EmbeddingDecoding

if TYPE_CHECKING:
    from pipeline.input.source import Source

GRID_ROWS = 16


class Decode(EmbeddingDecoding, RowJob):
    """Pictures drawn from image embeddings by a frozen decoder."""

    job: Literal["decode"] = "decode"
    draws: int = Field(1, ge=1)
    """Pictures an embedding, each with noise of its own; their ids end in ``/0``, ``/1``, ..."""

    def source(self) -> Source:
        variants = {"draw": tuple(map(str, range(self.draws)))} if self.draws > 1 else {}
        return replace(self.input.source(), variants=variants)

    def stage(self) -> StageSpec:
        shared = self.part(EmbeddingDecoding)
        return StageSpec.of("stages.decode.stage:DecodeEmbeddings", DecodeSettings(**dict(shared), seed=self.seed))

    def panels(self) -> list[Panel]:
        return [Panel("Draws", _draw_grid, "One line an embedding.")] if self.draws > 1 else []


def _draw_grid(view: View) -> Html:
    """One line an embedding, one column a draw."""
    draws = int(view.config["draws"])
    cells: dict[str, dict[str, Html | str]] = {}
    for row in view.rows(["id", "image"], limit=GRID_ROWS * draws, spread=False):
        key, _, draw = row["id"].rpartition("/")
        cells.setdefault(key, {})[draw] = picture(row["image"], 96, row["id"])
    names = list(map(str, range(draws)))
    return table(["id", *names], [[key, *(found.get(name, "") for name in names)] for key, found in cells.items()])
