"""The distance between what was made and the reference, of any number of rows."""

from __future__ import annotations

import numpy as np
import pytest

from index.gaussian import Gaussian, empty, fit, moments
from stages.ovi.scoring import frechet

NORMAL = np.random.default_rng(0).standard_normal((64, 8))


def reference() -> Gaussian:
    return fit(moments(NORMAL))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 40])
def test_a_few_embeddings_have_a_distance_or_none(rows: int) -> None:
    """Two have none: their shrinkage is 0, and a Gaussian along one line no density."""
    found = frechet(moments(NORMAL[:rows]) if rows else empty(8), reference())
    assert (found is None) == (rows < 3)
    assert found is None or 0 <= found < 8


def test_equal_embeddings_have_none() -> None:
    assert frechet(moments(np.ones((9, 8))), reference()) is None
