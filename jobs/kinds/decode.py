"""Job ``decode``: image embeddings, our own or somebody else's, to pictures."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jobs.page.html import Html, picture, table
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from pipeline.output.publish import loading
from stages.decode.settings import DecodeSettings, EmbeddingDecoding

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.input.source import Source

GRID_ROWS = 16


class Decode(EmbeddingDecoding, RowJob):
    """Pictures drawn from image embeddings by a frozen decoder."""

    job: Literal["decode"] = "decode"
    draws: int = Field(1, ge=1)
    """Pictures an embedding, each with noise of its own; their ids end in ``/0``, ``/1``, ..."""

    def source(self) -> Source:
        return self.input.source().drawn(self.draws)

    def stage(self) -> StageSpec:
        shared = self.part(EmbeddingDecoding)
        return StageSpec.of("stages.decode.stage:DecodeEmbeddings", DecodeSettings(**dict(shared), seed=self.seed))

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        adapter, decode = self.decode.ip_adapter, self.decode
        if adapter is None or "decoder.length" in finished.output.plan["metadata"]:
            return ""
        own = 'row["embedding"]' if "embedding" in self.keep else "[0.0] * WIDTH"
        width = finished.output.plan["metadata"]["decoder.width"]
        told = {
            "model": repr(decode.model), "revision": repr(decode.revision), "adapter": _adapter(adapter.path),
            "scale": adapter.scale, "steps": decode.steps, "guidance": decode.guidance, "width": width,
            "embedding": own.replace("WIDTH", width), "size": f", height={decode.size}, width={decode.size}",
        }  # fmt: skip
        if decode.size is None:
            told["size"] = ""
        rows = _ROW.format(rows=loading(finished.output)) if "embedding" in self.keep else _NO_ROW
        return _CARD.format(**told, rows=rows)

    def panels(self) -> list[Panel]:
        return [Panel("Draws", _draw_grid, "One line an embedding.")] if self.draws > 1 else []


_ROW = """from datasets import load_dataset

rows = {rows}
row = next(row for row in rows if row["status"] == "ok")
"""
_NO_ROW = "# An embedding of the input in place of the zeros; with `keep: [embedding]` it would stand in the rows.\n"
_CARD = """## Draw with a prompt beside the embedding

The pictures were drawn with an empty prompt. In plain diffusers there can be another:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model}, revision={revision})
pipe.load_ip_adapter({adapter}, image_encoder_folder=None)
pipe.set_ip_adapter_scale({scale})
{rows}embedding = torch.tensor({embedding}).reshape(1, 1, {width})
pair = [torch.cat([torch.zeros_like(embedding), embedding])] if {guidance} > 1 else [embedding]
options = dict(num_inference_steps={steps}, guidance_scale={guidance}{size}, ip_adapter_image_embeds=pair)
picture = pipe("", **options).images[0]
picture.save("drawn.png")
```

"""


def _adapter(path: str) -> str:
    """Arguments of `load_ip_adapter`: of a file here, or on the hub."""
    folder, _, name = path.rpartition("/")
    if os.path.isabs(path):
        return f"{folder!r}, subfolder='', weight_name={name!r}"
    owner, repository, *below = folder.split("/")
    return f"'{owner}/{repository}', subfolder={'/'.join(below)!r}, weight_name={name!r}"


def _draw_grid(view: View) -> Html:
    """One line an embedding, one column a draw."""
    draws = int(view.config["draws"])
    cells: dict[str, dict[str, Html | str]] = {}
    for row in view.rows(["id", "image"], limit=GRID_ROWS * draws, spread=False):
        key, _, draw = row["id"].rpartition("/")
        cells.setdefault(key, {})[draw] = picture(row["image"], 96, row["id"])
    names = list(map(str, range(draws)))
    return table(["id", *names], [[key, *(found.get(name, "") for name in names)] for key, found in cells.items()])
