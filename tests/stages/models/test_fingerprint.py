"""Which model it was: its weights' checksums, and the commit of the hub that a branch stood for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.contract import StageInfo
from pipeline.run.draft import _unpinned
from stages.models.files import _hub
from stages.models.fingerprint import describe_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_branch_is_told_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hub's cache, without the hub."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT / "unet"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"width": 4}))
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(snapshot / "config.json"))

    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    _hub.cache_clear()
    model = describe_model("org/name", None, "unet")
    assert model["commit"] == COMMIT
    pinned = {**model, "revision": COMMIT}
    (note,) = _unpinned(StageInfo((), {"unet": model, "vae": model}))
    assert note.endswith(f"revision: {COMMIT}")
    assert not list(_unpinned(StageInfo((), {"unet": pinned})))
    assert "commit" not in describe_model(str(snapshot))
    _hub.cache_clear()
