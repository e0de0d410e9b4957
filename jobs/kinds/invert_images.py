"""Job ``invert-images``: pictures to the noise latents that regenerate them, by one or several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from jobs.page.amounts import figure, mean
from jobs.page.html import Html, escape, measures, picture, table, tag
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from stages.engine.methods import Methods
from stages.inversion.settings import AnyInversionMethod, InvertImagesSettings

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.input.source import Source

GRID_PICTURES = 12
MEASURES = (
    "psnr", "ssim", "psnr_decoded", "latent_mse", "floor_psnr", "forwards", "backwards", "residual_max", "seed_std",
    "seed_kurtosis", "seed_autocorrelation",
)  # fmt: skip


class InvertImages(RowJob, InvertImagesSettings):
    """Pictures inverted through a frozen Stable Diffusion model (DDIM inversion, fixed points, LBO, ILB, ...): one
    row for each picture and method. The latent regenerates its picture in plain diffusers.

    The input has a column ``image``, and ``prompt`` where captions are to be used (map yours with ``columns``).
    """

    job: Literal["invert-images"] = "invert-images"

    def source(self) -> Source:
        from dataclasses import replace

        return replace(self.input.source(), variants={"method": tuple(method.label for method in self.methods)})

    def stage(self) -> StageSpec:
        return StageSpec.of("stages.inversion.stage:InvertImages", self.part(InvertImagesSettings))

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        from jobs.kinds.regeneration import lines
        from stages.models.families import read_geometry

        label = next((method.label for method in self.methods if method.extra is None), None)
        if label is None:
            return _CARD_OF_MORE
        geometry = read_geometry(self)
        shown = lines(
            geometry, finished.output, steps=self.steps, guidance=self.guidance, negative=self.negative,
            method=label, buckets=self.fit == "bucket", dtype=self.dtype,
            said=None if self.inverter is None else geometry.usage.from_row(),
        )  # fmt: skip
        return _CARD.format(lines=shown)

    def redraws(self, row: Mapping[str, Any]) -> bool:
        return any(method.label == row["method"] and method.extra is None for method in self.methods)

    def panels(self) -> list[Panel]:
        note = "Means over the pictures. PSNR in dB: against the picture, and against what its latent decodes to."
        return [
            Panel("Methods of inversion", _draw_methods, note),
            Panel("Picture by method", _draw_grid, "Regenerated from the stored latent; PSNR beneath."),
        ]


_CARD = """## From a row back to its picture

Any row of a method without extra state regenerates its picture in plain diffusers:

{lines}

"""
_CARD_OF_MORE = """## From a row back to its picture

The methods of this dataset store more than a seed (`latent_2`, `bias`, `input_bias`, `null_text`, `picture_latent`),
which plain diffusers cannot use:
`reconstruction` is what their stored state regenerates.

"""


def _draw_methods(view: View) -> Html:
    """A row a method; those that store more than a seed stand apart."""

    given = TypeAdapter(Methods[AnyInversionMethod]).validate_python(view.config["methods"])
    columns = [name for name in MEASURES if name in view.columns]
    rows = view.rows(["method", *columns], 20_000)
    seed_only = [method.label for method in given if method.extra is None]
    extra = [method.label for method in given if method.extra is not None]

    def drawn(labels: Sequence[str]) -> Html:
        own = [[row for row in rows if row["method"] == label] for label in labels]
        counted: dict[str, list[float | None]] = {"rows": [len(one) for one in own]}
        return measures(labels, counted | {name: [mean(row[name] for row in one) for one in own] for name in columns})

    parts = [drawn(seed_only)] if seed_only else []
    if extra:
        parts += [tag("p", "With extra state beside the seed:", class_="quiet"), drawn(extra)]
    return escape(parts)


def _draw_grid(view: View) -> Html:

    if "reconstruction" not in view.columns:
        return Html()
    labels = [m.get("name") or m["method"] for m in view.config.get("methods", ())]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    wanted = ["id", "method", "picture", "reconstruction", "psnr", "floor_psnr"]
    for row in view.rows(wanted, GRID_PICTURES * max(1, len(labels))):
        found.setdefault(str(row["id"]).removesuffix(f"/{row['method']}"), {})[row["method"]] = row
    body = []
    for name, own in list(found.items())[:GRID_PICTURES]:
        first = next(iter(own.values()))
        floor = f"floor {figure(first['floor_psnr'], 'psnr')}"
        cells: list[Any] = [tag("figure", picture(first["picture"], 128, name), tag("figcaption", floor))]
        for label in labels:
            drawn = own.get(label)
            shown = None
            if drawn is not None and drawn["psnr"] is not None:
                said = tag("figcaption", figure(drawn["psnr"], "psnr"))
                shown = tag("figure", picture(drawn["reconstruction"], 128, label), said)
            cells.append(shown)
        body.append(cells)
    return table(["picture", *labels], body)
