"""Aspect buckets: the sizes at which pictures of any shape are shown to a model, all of about one area.

After Podell et al., 2023 (SDXL), section 2.3 and appendix I: widths in steps of 64 pixels, for each the largest height
that keeps the area; at 1024 pixels these are sizes of their table.
"""

from __future__ import annotations

import math

from stages.models.latent import Geometry

Size = tuple[int, int]
"""Width and height in pixels."""
STEPS = 16
"""Steps of a side in the square's: 64 pixels of 1024."""
STRETCH = 2
"""Sides go from the square's by this factor down and up: shapes from 1 : 4 to 4 : 1."""


def buckets_of(geometry: Geometry) -> tuple[Size, ...]:
    """The buckets around a model's square, the square among them; none has a larger area.

    Raises:
        ValueError: The model takes no other size.
    """
    square, sizes = geometry.width, geometry.sizes
    step = sizes.multiple * max(1, math.ceil(square / STEPS / sizes.multiple))
    longest = min(square * STRETCH, sizes.largest or square * STRETCH)
    found = {(square, square)}
    for width in range(step * math.ceil(square / STRETCH / step), square + 1, step):
        height = min(square * square // width, longest) // step * step
        found |= {(width, height), (height, width)}
    found = {size for size in found if min(size) >= step}
    if len(found) == 1:
        raise ValueError(
            f"fit: bucket: model {sizes.model!r} takes no size beside {square} x {square} in steps of {step}; "
            "take another `size`, or fit: crop"
        )
    return tuple(sorted(found))


def bucket_for(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket of the nearest shape: the one that least of the picture is cut off for."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - shape), -bucket[0] * bucket[1]))
