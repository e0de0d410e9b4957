"""Random pictures of awkward sizes."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZES = ((32, 32), (37, 53), (200, 31), (64, 199), (33, 32))


def awkward_pictures(seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES]
