"""Job ``caption``: pictures that have none to captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from jobs.page import charts
from jobs.page.html import Exhibit, Html, escape, gallery, table
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from stages.caption.settings import Captioning, CaptionSettings

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.input.source import Source

SHOWN = 24


class Caption(Captioning, RowJob):
    """Captions of pictures by a frozen model that says what it sees.

    The column `caption` is a prompt to every other job; with ``keep: [image]`` the output is a captioned dataset.
    """

    job: Literal["caption"] = "caption"
    draws: int = Field(1, ge=1)
    """Captions a picture, each drawn with numbers of its own; their ids end in ``/0``, ``/1``, ... More than one needs
    `temperature`."""

    @model_validator(mode="after")
    def _differ(self) -> Caption:
        if self.draws > 1 and self.temperature is None:
            raise ValueError("`draws` would all be the same: set `temperature`, 1.0 for instance")
        return self

    def source(self) -> Source:
        return self.input.source().drawn(self.draws)

    def stage(self) -> StageSpec:
        shared = self.part(Captioning)
        return StageSpec.of("stages.caption.stage:CaptionPictures", CaptionSettings(**dict(shared), seed=self.seed))

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        return _CARD.format(output=finished.output.path) if "image" in self.keep else ""

    def panels(self) -> list[Panel]:
        note = "How long captions are, and what some pictures are said to show."
        return [Panel("Captions", _draw_captions, note)]


_CARD = """## A captioned reference of it

```yaml
job: reference
input: {output}
captions: true
encoder: the image encoder
```

"""


def _draw_captions(view: View) -> Html:
    lengths = charts.histogram(view.values("caption_tokens"), "tokens of a caption")
    if "image" not in view.named("image"):
        rows = view.rows(["id", "caption"], limit=SHOWN)
        return escape([lengths, table(["id", "caption"], [[row["id"], row["caption"]] for row in rows])])
    rows = view.rows(["id", "image", "caption"], limit=SHOWN)
    return escape([lengths, gallery(Exhibit(row["image"], row["caption"], row["id"]) for row in rows)])
