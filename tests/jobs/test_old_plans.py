"""What describes a job stays as it was, key by key: outputs planned earlier are resumed, their fingerprints hold.

``old_plans/fields.json`` holds a job of each kind and what commit 7532baf put into its fingerprint (``ROOT`` stands for
the checkout, ``INPUT`` for a folder with the input), but for the fingerprint of the miniature world's oracle, which was
trained anew: a run that it scored is another run. Where steps are few LBO's `passes` are given, whose default was 10
there and is 30 now: such a run is refused by that name, and goes on once they are given. An option that is new since
then is declared with `pipeline.contract.added` and does not show here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.run import run_spec
from jobs.schema.base import RowJob
from jobs.schema.reading import load
from pipeline.contract import speed_names
from pipeline.run.draft import draft
from pipeline.run.plan import differences
from tests.support import ROOT

GAINED = {
    "prompt_tokens: int64", "prompt_truncated: bool", "dtype: string", "candidate: int64", "job_seed: int64",
}  # fmt: skip
"""Columns that are new since then: new runs have them, and resumed ones go on without."""
LEFT_OPEN = frozenset({"slots"})
"""What was a number by default and is left to the memory of the device now. It changes no byte: whatever a plan says of
it, a resumed run may have another."""
OPEN_FIELDS = {f"{part}.{name}" for part in ("config", "stage") for name in LEFT_OPEN}
HERE = Path(__file__).parent / "old_plans"
OLD: dict[str, Any] = json.loads((HERE / "fields.json").read_text())


@pytest.mark.parametrize("kind", OLD)
def test_a_job_is_described_as_it_was(kind: str, tmp_path: Path) -> None:
    here = _inputs(tmp_path)
    job = load(here(OLD[kind]["job"]))
    assert isinstance(job, RowJob)
    old, new = here(OLD[kind]["fields"]), dict(draft(run_spec(job, str(tmp_path / "out"))).fields)
    assert not OPEN_FIELDS & old.keys() or speed_names(type(job)) >= LEFT_OPEN
    assert differences(old, new, LEFT_OPEN) == {}
    new |= {name: old[name] for name in OPEN_FIELDS & old.keys() if new[name] is None}
    new = {name: _closed(value, old.get(name)) for name, value in new.items()}
    new["output columns"] = [column for column in new["output columns"] if column not in GAINED]
    assert new == old


def _closed(new: Any, old: Any) -> Any:
    """What is new, with the old numbers where blocks leave open what they used to give one for."""
    if isinstance(new, list) and isinstance(old, list):
        return [_closed(*pair) for pair in zip(new, old, strict=True)] if len(new) == len(old) else new
    if not isinstance(new, dict) or not isinstance(old, dict):
        return new
    return {
        name: old.get(name) if name in LEFT_OPEN and value is None else _closed(value, old.get(name))
        for name, value in new.items()
    }


def _inputs(tmp_path: Path) -> Callable[[Any], Any]:
    """The inputs of the old jobs; what comes back puts their place into a job or a plan."""
    examples = Path(ROOT) / "jobs/examples"
    for name in ("pictures", "concepts"):
        shutil.copytree(examples / "quickstart" / name, tmp_path / name)
    shutil.copytree(HERE / "pictures", tmp_path / "pictures", dirs_exist_ok=True)
    shutil.copy(HERE / "pictures.jsonl", tmp_path)
    shutil.copy(examples / "quickstart/prompts.jsonl", tmp_path)
    shutil.copytree(examples / "rare-concepts", tmp_path / "rare-concepts")

    def here(plain: Any) -> Any:
        return json.loads(json.dumps(plain).replace("INPUT", str(tmp_path)).replace("ROOT", str(ROOT)))

    return here


SLOWER: dict[str, dict[str, Any]] = {
    "reference": {"batch_size": 1, "threads": 1, "index": {"memory": "1GB"}},
    "invert-images": {"device": "cpu", "slots": 1},
    "invert-prompts": {
        "methods": [
            "text-embedding",
            {"method": "ovi", "compact": True, "slots": 1},
            {"method": "trained-prior", "steps": 5},
        ]
    },
    "learn-concepts": {"device": "cpu", "slots": 1, "checkpoint_seconds": 1},
    "rare-concepts": {"slots": 1},
}


@pytest.mark.parametrize("kind", SLOWER)
def test_after_running_out_of_memory_a_run_resumes_with_less(kind: str, tmp_path: Path) -> None:
    """Before: "planned differently", so the rows that were done had to be paid for again."""
    given = _inputs(tmp_path)(OLD[kind]["job"])
    job, less = load(given), load(_merged(given, SLOWER[kind]))
    assert isinstance(job, RowJob)
    assert isinstance(less, RowJob)
    was, now = run_spec(job, str(tmp_path / "out")), run_spec(less, str(tmp_path / "out"))
    old, new = dict(draft(was).fields), dict(draft(now).fields)
    assert differences(old, new) != {}  # they stand in the plan, as they did
    assert differences(old, new, now.speed) == {}
    other = dict(draft(replace(now, seed=7)).fields)
    assert differences(old, other, now.speed) == {"seed": (job.seed, 7)}
    changed = {**new, "config.more": "float16", "stage.more": "float16"}
    assert differences(old, changed, now.speed).keys() == {"config.more"}


def _merged(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return given | {k: _merged(given[k], v) if isinstance(given.get(k), dict) else v for k, v in more.items()}
