"""The lines of a card are run: what they load draws the picture that the model itself draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from stages.models.latent import LatentModel
from stages.models.pictures import to_picture
from stages.models.sampler import sample


def check_card_lines(model: LatentModel, prompt: str = "red star") -> None:
    """One picture in 4 steps from the same noise, equal but for a level of rounding."""
    names, load = model.geometry.usage.regenerating()
    known: dict[str, Any] = {}
    exec(f"import torch\nfrom diffusers import {', '.join(names)}\n{load}", known)
    z_BCHW = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    picture = known["pipe"](prompt, num_inference_steps=4, guidance_scale=1.0, latents=z_BCHW).images[0]
    made = sample(model.predictor(), model.schedule(4), z_BCHW, model.condition([prompt]))
    mine = to_picture(model.decode(made)[0])
    assert isinstance(picture, Image.Image)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(mine).astype(int)).max() <= 1
