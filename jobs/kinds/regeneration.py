"""The lines of a dataset card that turn a stored latent back into its picture, in plain diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.output.dataset import Output
    from stages.models.latent import Geometry

_LINES = """```python
import torch
from datasets import load_dataset
from diffusers import {names}{and_pil}

rows = {rows}
row = next(row for row in rows if row["status"] == "ok"{which})
{load}
seed = torch.tensor(row["latent"]).reshape(1, {shape}){found}
options = dict(num_inference_steps={steps}, {guidance}, {more}{size}latents={latents})
picture = pipe({said}, **options).images[0]{then}
picture.save("again.png")
```"""


def lines(
    geometry: Geometry, output: Output, *, steps: int, guidance: float, negative: str | None,
    method: str | None = None, said: str | None = None, buckets: bool = False,
    dtype: str = "float32", guide: str | None = None,
) -> str:  # fmt: skip
    """A block of Python that regenerates the picture of the first processed row.

    Args:
        output: The dataset.
        method: Of the row; None: whichever comes first.
        said: How the pipeline is told what the picture shows; None: by the row's prompt.
        buckets: The size is the row's own.
        guide: Of the row; None: there is no such column.
        dtype: Of the networks that found the latents.
    """
    from pipeline.output.publish import loading

    names, load = geometry.usage.regenerating()
    shape = ", ".join(map(str, geometry.latent_shape))
    width, height = map(str, geometry.picture_size)
    if buckets:
        width, height = 'row["width"]', 'row["height"]'
        factor = geometry.sizes.factor
        shape = f"{geometry.latent_shape[0]}, {height} // {factor}, {width} // {factor}"
    return _LINES.format(
        names=", ".join(names), load=load, rows=loading(output), shape=shape,
        which="".join(f' and row["{name}"] == "{one}"' for name, one in (("method", method), ("guide", guide)) if one),
        steps=steps,
        guidance=geometry.usage.guidance(guidance, negative), said=said or geometry.usage.prompt,
        latents=geometry.usage.latents, more=geometry.usage.more,
        and_pil="\nfrom PIL import Image" if geometry.usage.picture else "",
        then=f"\n{geometry.usage.picture}" if geometry.usage.picture else "",
        found="" if dtype == "float32" else f"  # found with networks in {dtype}",
        size=f"height={height}, width={width}, " if buckets or geometry.says_size else "",
    )  # fmt: skip
