"""Fixtures that several test files share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402

from jobs import registry  # noqa: E402
from jobs.chain import step_model  # noqa: E402
from tests.toy_job import Toy  # noqa: E402


@pytest.fixture
def toy_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Toy]]:
    """The kind ``toy``, registered for one test."""
    monkeypatch.setitem(registry.KINDS, "toy", "tests.toy_job:Toy")
    step_model.cache_clear()
    yield Toy
    step_model.cache_clear()
