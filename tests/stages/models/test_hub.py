"""Models from the hub: one that does not answer is asked once, and the user is told in a sentence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from jobs.dry_run import plan_job
from jobs.schema import reading
from stages.models import hub


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    ask = hub.reachable
    ask.cache_clear()
    yield
    ask.cache_clear()


def test_models_that_lie_in_no_folder(tmp_path: Path) -> None:
    image = {
        "job": "invert-images",
        "input": "x",
        "model": "org/model",
        "vae": "org/vae",
        "loras": [{"path": "org/lora"}],
    }
    assert list(hub.hub_ids(reading.load(image))) == ["org/model", "org/vae", "org/lora"]
    methods = ["ovi", {"method": "trained-prior", "prior": "org/prior"}]
    prompts = {"job": "invert-prompts", "input": "x", "encoder": "micro:prior", "methods": methods}
    assert list(hub.hub_ids(reading.load({**prompts, "decode": {"model": str(tmp_path)}}))) == ["org/prior"]


@pytest.mark.parametrize("name", ["nobody/nothing-here", "just-a-name"])
def test_a_hub_that_does_not_answer_is_asked_once(
    name: str, unreachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = reading.load({"job": "reference", "input": "micro-world://train?rows=8&seed=0", "encoder": name})
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"the client waits {seconds} s and tries again"))
    with pytest.raises(ValueError, match="no encoder") as told:
        list(plan_job(job, "out"))
    why = "the hub is not asked: 127.0.0.1 cannot be reached from here"
    assert told.value.__notes__ == [f"{name} is no folder here, and {why}"]


def test_without_hub_ids_nothing_is_asked(unreachable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked"))
    with hub.asked(reading.load({"job": "reference", "input": "x", "encoder": "micro:prior"})):
        pass
