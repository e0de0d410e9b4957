"""What tests of several kinds of job share."""

from __future__ import annotations

import pytest

from tests.support.tiny_kandinsky import build_prior


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny prior with random weights."""
    return build_prior(tmp_path_factory.mktemp("models") / "prior")
