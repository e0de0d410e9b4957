"""What describes a job stays as it was, key by key: outputs planned earlier are resumed, their fingerprints hold.

``old_plans/fields.json`` holds a job of each kind and what commit 7532baf put into its fingerprint (``ROOT`` stands for
the checkout, ``INPUT`` for a folder with the input). An option that is new since then is declared with
`pipeline.contract.added` and does not show here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.run import run_spec
from jobs.schema.base import RowJob
from jobs.schema.reading import load
from pipeline.run.draft import draft
from pipeline.run.plan import differences
from tests.support import ROOT

GAINED = {"prompt_tokens: int64", "prompt_truncated: bool"}
"""Columns that are new since then: new runs have them, and resumed ones go on without."""
OLD: dict[str, Any] = json.loads((Path(__file__).parent / "old_plans/fields.json").read_text())


@pytest.mark.parametrize("kind", OLD)
def test_a_job_is_described_as_it_was(kind: str, tmp_path: Path) -> None:
    examples = Path(ROOT) / "jobs/examples"
    for name in ("pictures", "concepts"):
        shutil.copytree(examples / "quickstart" / name, tmp_path / name)
    for name in ("pictures.jsonl", "prompts.jsonl"):
        shutil.copy(examples / "quickstart" / name, tmp_path / name)
    shutil.copytree(examples / "rare-concepts", tmp_path / "rare-concepts")

    def here(plain: Any) -> Any:
        return json.loads(json.dumps(plain).replace("INPUT", str(tmp_path)).replace("ROOT", str(ROOT)))

    job = load(here(OLD[kind]["job"]))
    assert isinstance(job, RowJob)
    old, new = here(OLD[kind]["fields"]), dict(draft(run_spec(job, str(tmp_path / "out"))).fields)
    assert differences(old, new) == {}
    new["output columns"] = [column for column in new["output columns"] if column not in GAINED]
    assert new == old
