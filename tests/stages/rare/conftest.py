"""The encoder that scores in these tests."""

from __future__ import annotations

import pytest

from tests.support import tiny_kandinsky


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_kandinsky.build_prior(tmp_path_factory.mktemp("clip"))
