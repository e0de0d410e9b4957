"""What the stock pipeline of diffusers makes of seeds that were found here, loaded as a dataset's card says, in a dtype
of one's choice: schedulers of diffusers round the latent to the network's type at each step, inversion here does not.

Legend: B rows; `seed_BCHW` seeds; `x_BCHW` pictures in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stages.models.autoencoder import on_white
from stages.models.latent import LatentModel
from stages.models.usage import Usage


class Stock:
    """A model's pipeline, as `Usage` loads it, in another dtype: networks, autoencoder and latents.

    Args:
        model: What the seeds were found with; says how the pipeline is loaded and called.
        dtype: For instance ``bfloat16``.
    """

    def __init__(self, model: LatentModel, dtype: str) -> None:
        usage, names = model.geometry.usage, {}
        imported, load = usage.regenerating()
        load = load.replace("dtype=torch.float32", f"dtype=torch.{dtype}")
        exec(f"import torch\nfrom diffusers import {', '.join(imported)}\n{load}", names)  # the card's own lines
        self.pipe: Any = names["pipe"]
        self.pipe.to(model.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.geometry, self.dtype = model.geometry, getattr(torch, dtype)

    def __call__(self, seed_BCHW: torch.Tensor, prompts: Sequence[str], steps: int, guidance: float) -> torch.Tensor:
        """x_BCHW of the seeds under their prompts; one by one where a card hands over the text of each by itself, since
        the text's length then has a say in the picture."""
        usage = self.geometry.usage
        if usage.prompt != Usage.prompt and len(prompts) > 1:
            alone = [
                self(seed, [prompt], steps, guidance) for seed, prompt in zip(seed_BCHW.split(1), prompts, strict=True)
            ]
            return torch.cat(alone)
        pipe, seed = self.pipe, seed_BCHW.to(self.pipe.device, self.dtype)
        told = eval(f"dict({usage.more}{usage.guidance(guidance, None)})")
        given = eval(usage.latents, {"pipe": pipe, "seed": seed})
        drawn = pipe(
            prompt=list(prompts), num_inference_steps=steps, latents=given, output_type="pt",
            height=self.geometry.height, width=self.geometry.width, **told,
        ).images  # fmt: skip
        return on_white(drawn.float() * 2 - 1)
