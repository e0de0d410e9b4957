"""Aspect buckets: SDXL's table, and the nearest shape."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from stages.models.buckets import bucket_for, buckets_of
from stages.models.latent import Sizes

SDXL = {(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088)}
"""Appendix I of Podell et al., 2023: the tallest of each width."""


def geometry(size: int, multiple: int, largest: int | None = None) -> Any:
    return SimpleNamespace(width=size, height=size, sizes=Sizes("m", 8, multiple, largest=largest))


@pytest.mark.parametrize("multiple", [16, 32, 64])
def test_at_1024_pixels_they_are_sizes_of_sdxl_s_table(multiple: int) -> None:
    tall = {size for size in buckets_of(geometry(1024, multiple)) if size[0] < size[1]}
    assert tall == SDXL
    wide = {size for size in buckets_of(geometry(1024, multiple)) if size[0] > size[1]}
    assert wide == {(h, w) for w, h in SDXL}


@pytest.mark.parametrize(("size", "multiple", "largest"), [(512, 64, None), (768, 16, 1024), (64, 16, None)])
def test_every_bucket_is_a_size_that_the_model_takes(size: int, multiple: int, largest: int | None) -> None:
    found = buckets_of(geometry(size, multiple, largest))
    for width, height in found:
        Sizes("m", 8, multiple, largest=largest).check(width, height)
        assert width * height <= size * size
    assert (size, size) in found
    assert len(found) > 2


def test_a_picture_goes_where_least_of_it_is_cut_off() -> None:
    found = buckets_of(geometry(1024, 64))

    def lost(size: tuple[int, int], bucket: tuple[int, int]) -> float:
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        return 1 - bucket[0] * bucket[1] / (scale**2 * size[0] * size[1])

    for size in [(640, 480), (480, 640), (4000, 1000), (9000, 1000), (1023, 1024), (1600, 900), (3, 2)]:
        chosen = bucket_for(size, found)
        assert math.isclose(lost(size, chosen), min(lost(size, bucket) for bucket in found), abs_tol=1e-9)
    assert bucket_for((500, 500), found) == (1024, 1024)


def test_a_model_of_one_size_says_so() -> None:
    with pytest.raises(ValueError, match="takes no size beside 64 x 64 in steps of 64"):
        buckets_of(geometry(64, 64))
