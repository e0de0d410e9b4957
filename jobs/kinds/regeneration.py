"""The lines of a dataset card that turn a stored latent back into its picture, in plain diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.models.latent import Geometry

_LINES = """```python
import torch
from datasets import load_dataset
from diffusers import {names}

row = load_dataset("OUT", split="train")[0]
{load}
seed = torch.tensor(row["latent"]).reshape(1, {shape})
options = dict(num_inference_steps={steps}, guidance_scale={guidance}{negative}, latents=seed)
picture = pipe({said}, **options).images[0]
picture.save("again.png")
```"""


def lines(geometry: Geometry, *, steps: int, guidance: float, negative: str | None, said: str = 'row["prompt"]') -> str:
    """A block of Python that regenerates a row's picture.

    Args:
        said: How the pipeline is told what the picture shows.
    """
    return _LINES.format(
        names=", ".join(geometry.usage.names), load=geometry.usage.load,
        shape=", ".join(map(str, geometry.latent_shape)), steps=steps, guidance=guidance,
        negative=f", negative_prompt={negative!r}" if negative else "", said=said,
    )  # fmt: skip
