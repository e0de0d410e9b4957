"""Job ``invert-prompts``: prompts to image embeddings by one or several methods, and from there to pictures and scores.

The output has one row for each (prompt, method): compare methods with ``GROUP BY method``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from jobs.page.html import Html, measures, picture, table
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from stages.models.decoding import Decode
from stages.ovi.settings import InvertPromptsSettings, PromptInversion, Score

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.input.source import Source

SUMMARY_FILE = "methods.json"
MEASURES = ("text_cosine", "norm", "mahalanobis", "nearest_cosine", "clip_score", "bound", "success", "steps", "passes")
"""Columns whose means stand in the table of methods, where the dataset has them."""
GRID_PROMPTS = 16


class InvertPrompts(PromptInversion, RowJob):
    """Prompts inverted to CLIP image embeddings (optimisation-based visual inversion and its rivals), one row for each
    prompt and method; with a decoder also to pictures.
    """

    job: Literal["invert-prompts"] = "invert-prompts"
    decode: Decode | None = None
    """Make pictures. Left out: embeddings only, which a later job can decode."""
    score: tuple[Score, ...] = ()
    """``clip``: CLIP score of the pictures; ``oracle``: what the miniature world's judge finds (needs the columns of
    its prompt sets); ``frechet``: Frechet distance in CLIP space to the reference."""
    draws: int = Field(1, ge=1)
    """Rows a prompt and method, each with its own first tokens and decoder noise (T2I-CompBench++ takes 10)."""

    @model_validator(mode="after")
    def _consistent(self) -> InvertPrompts:
        if self.decode is None and {"clip", "oracle"} & set(self.score):
            raise ValueError("score: `clip` and `oracle` judge pictures; add a `decode` block")
        if self.reference is None and "frechet" in self.score:
            raise ValueError("score: `frechet` compares with the reference; add `reference`")
        return self

    def source(self) -> Source:
        from dataclasses import replace

        variants: dict[str, tuple[str, ...]] = {}
        if self.draws > 1:
            variants["draw"] = tuple(str(draw) for draw in range(self.draws))
        variants["method"] = tuple(method.label for method in self.methods)
        return replace(self.input.source(), variants=variants)

    def stage(self) -> StageSpec:
        shared = self.part(PromptInversion)
        settings = InvertPromptsSettings(**dict(shared), decoder=self.decode, scores=self.score, seed=self.seed)
        return StageSpec.of("stages.ovi.stage:InvertPrompts", settings)

    products: ClassVar[tuple[str, ...]] = (SUMMARY_FILE,)

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        labels = [method.label for method in self.methods]
        summary = summarise(finished.tables(), finished.summaries(), labels, self.reference)
        with finished.output.open_file(SUMMARY_FILE, "wb") as file:
            file.write(json.dumps(summary, indent=2).encode())

    def panels(self) -> list[Panel]:
        note = "One row a method: means over its prompts; seconds are those of one worker."
        return [Panel("Methods", _draw_methods, note), Panel("Prompt by method", _draw_grid)]


def summarise(
    tables: Iterable[Any], summaries: Iterable[Mapping[str, Any]], labels: Sequence[str], reference: str | None
) -> dict[str, dict[str, float | None]]:
    """Method -> rows that are well, failed ones, means of its measures, seconds a prompt, slot occupancy, Frechet
    distances.

    Args:
        tables: Committed tables.
        summaries: What `stages.ovi.summary` left of each shard.
        labels: Of the methods.
        reference: The job's reference, for the Frechet distances.
    """
    import numpy as np
    import pyarrow.compute as pc

    from index import gaussian
    from stages.ovi.scoring import frechet
    from stages.ovi.summary import SPENT

    found: dict[str, dict[str, float | None]] = {label: {} for label in labels}
    counts = {label: {"rows": 0.0, "failed": 0.0} for label in labels}
    sums: dict[tuple[str, str], list[float]] = {}
    for shard in tables:
        for label in labels:
            mine = shard.filter(
                pc.ends_with(shard.column("id"), f"/{label}")
            )  # a failed row has its method there alone
            part = mine.filter(pc.equal(mine.column("status"), "ok"))
            counts[label]["rows"] += len(part)
            counts[label]["failed"] += pc.sum(pc.equal(mine.column("status"), "failed")).as_py() or 0
            for name in MEASURES:
                if name in part.column_names:
                    values = part.column(name).drop_null().cast("float64").to_numpy()
                    held = sums.setdefault((label, name), [0.0, 0.0])
                    held[0] += float(values.sum())
                    held[1] += len(values)
    totals = {label: np.zeros(len(SPENT)) for label in labels}
    moments: dict[str, Any] = {}
    for summary in summaries:
        groups: dict[str, dict[str, Any]] = {}
        for key, array in summary.items():
            kind, _, rest = key.partition(".")
            if kind == "moments":
                name, _, field = rest.rpartition(".")
                groups.setdefault(name, {})[field] = array
            else:  # older code's `totals` had two counts before
                totals[rest] = totals[rest] + np.asarray(array)[-len(SPENT) :]
        for name, arrays in groups.items():
            part = gaussian.Moments.from_arrays(arrays)
            moments[name] = gaussian.merge([moments[name], part]) if name in moments else part
    for (label, name), (total, count) in sums.items():
        found[label][name] = total / count if count else None
    for label, values in totals.items():
        spent, rows = dict(zip(SPENT, values.tolist(), strict=True)), counts[label]["rows"]
        found[label].update(
            counts[label],
            seconds_per_prompt=spent["seconds"] / rows if rows else None,
            decode_seconds_per_prompt=spent["decode_seconds"] / rows if rows and spent["decode_seconds"] else None,
            occupancy=spent["busy_slot_steps"] / spent["slot_steps"] if spent["slot_steps"] else None,
        )
    if moments and reference is not None:
        from index.reference import Reference

        target = Reference.open(reference).gaussian
        for name, statistics in moments.items():
            kind, _, label = name.partition(".")
            found[label][f"frechet_{kind}"] = frechet(statistics, target)
    return found


def _draw_methods(view: View) -> Html:

    try:
        with view.output.open_file(SUMMARY_FILE) as file:
            summary: dict[str, dict[str, float | None]] = json.loads(file.read())
    except FileNotFoundError:
        return Html()
    names = list(dict.fromkeys(name for found in summary.values() for name in found))
    return measures(list(summary), {name: [found.get(name) for found in summary.values()] for name in names})


def _draw_grid(view: View) -> Html:
    """One line a prompt, one column a method."""

    if view.columns.get("image") != "image":
        return Html()
    labels = [method.get("name") or method["method"] for method in view.config.get("methods", [])]
    cells: dict[str, dict[str, Any]] = {}
    prompts: dict[str, str] = {}
    for row in view.rows(["id", "prompt", "method", "image"], limit=GRID_PROMPTS * len(labels), spread=False):
        key = row["id"].removesuffix(f"/{row['method']}")
        prompts[key] = row["prompt"]
        cells.setdefault(key, {})[row["method"]] = row["image"]
    full = sorted(cells, key=lambda key: -len(cells[key]))[:GRID_PROMPTS]
    lines = [
        [prompts[key], *(picture(cells[key].get(label), 96, f"{label}: {prompts[key]}") for label in labels)]
        for key in full
    ]
    return table(["prompt", *labels], lines)
