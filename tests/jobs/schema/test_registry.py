"""Which kinds of job there are."""

from __future__ import annotations

import pytest

from jobs.schema import registry


def test_a_kind_without_a_module_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "ghost", "jobs.ghost:Ghost")
    assert "ghost" not in registry.kinds()
    with pytest.raises(KeyError):
        registry.find("ghost")
