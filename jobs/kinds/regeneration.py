"""The lines of a dataset card that turn a stored latent back into its picture, in plain diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.models.unet import Geometry

_LINES = """```python
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, DiffusionPipeline

row = load_dataset("OUT", split="train")[0]
pipe = DiffusionPipeline.from_pretrained("{model}", torch_dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
seed = torch.tensor(row["latent"]).reshape(1, {shape})
options = dict(num_inference_steps={steps}, guidance_scale={guidance}{negative}, latents=seed)
picture = pipe({said}, **options).images[0]
picture.save("again.png")
```"""


def numbers(shape: tuple[int, ...]) -> str:
    """``4, 64, 64``."""
    return ", ".join(map(str, shape))


def lines(
    model: str, geometry: Geometry, *, steps: int, guidance: float, negative: str | None, said: str = 'row["prompt"]'
) -> str:
    """A block of Python that regenerates a row's picture.

    Args:
        said: How the pipeline is told what the picture shows.
    """
    return _LINES.format(
        model=model, shape=numbers(geometry.latent_shape), steps=steps, guidance=guidance,
        negative=f", negative_prompt={negative!r}" if negative else "", said=said,
    )  # fmt: skip
