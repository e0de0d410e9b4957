"""Lines of Python for dataset cards: how a reader gets a latent model back in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


def guidance_scale(guidance: float, negative: str | None) -> str:
    """Arguments of a `pipe` with classifier-free guidance, or with one told to the network."""
    said = f", negative_prompt={negative!r}" if negative else ""
    return f"guidance_scale={guidance}{said}"


@dataclass(frozen=True)
class Usage:
    """How a reader of a dataset gets the model back in plain diffusers, as lines of Python.

    Attributes:
        names: What `pipeline` takes from diffusers.
        pipeline: Lines that make `pipe`, the model's own pipeline.
        sampler_names: What `sampler` takes from diffusers.
        sampler: Lines that give `pipe` the sampler under which a latent found with this model regenerates its picture;
            "" where that is its own.
        text_latent: Argument of `pipe` -> column of a stored text latent and its shape; together they stand for a
            prompt.
        latents: What `pipe` is given as `latents`, of `seed` (1, C, H, W).
        guidance: What it is given of a guidance scale and a negative prompt.
        more: Further arguments of `pipe`, each with ", " behind it.
        prompt: What it is given of a dataset's `row` that has a prompt.
        picture: A line that makes the dataset's kind of `picture` of the pipeline's, by PIL's `Image`.
    """

    names: tuple[str, ...]
    pipeline: str
    sampler_names: tuple[str, ...]
    sampler: str
    text_latent: Mapping[str, tuple[str, tuple[int, ...]]]
    latents: str = "seed"
    guidance: Callable[[float, str | None], str] = guidance_scale
    more: str = ""
    prompt: str = 'prompt=row["prompt"]'
    picture: str = ""

    def regenerating(self) -> tuple[tuple[str, ...], str]:
        """What is imported from diffusers, and the lines that make a `pipe` which regenerates pictures."""
        return tuple(sorted({*self.names, *self.sampler_names})), f"{self.pipeline}\n{self.sampler}".rstrip()

    def from_row(self) -> str:
        """Arguments that give `pipe` the text latent of a dataset's `row` instead of a prompt."""
        return ", ".join(
            f'{argument}=torch.tensor(row["{column}"]).reshape({", ".join(map(str, shape))})'
            for argument, (column, shape) in self.text_latent.items()
        )
