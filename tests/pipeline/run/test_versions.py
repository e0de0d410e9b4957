"""Which packages rows were made with: in the plan, in each record, and told where a run is resumed under others."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.output.progress import Progress
from pipeline.run.driver import Resources, run
from pipeline.run.plan import make_plan
from pipeline.run.versions import versions
from tests.support.faulty import commit_plain, run_plain, spec_for

LINES = [f"line {n}" for n in range(20)]


def test_plan_and_card_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_for(tmp_path, LINES)
    output = run_plain(spec)
    for name in ("torch", "diffusers", "transformers", "pyarrow"):
        assert output.plan["versions"][name] == version(name)
    assert {"latentmill", "faiss"} <= set(output.plan["versions"])
    card = (tmp_path / "out/README.md").read_text()
    assert f"\nMade with `latentmill {version('latentmill')}, torch {version('torch')}, " in card
    assert "## Versions" not in card
    monkeypatch.setattr("pipeline.run.plan.versions", lambda: {"torch": "1.0"})
    assert make_plan(spec).fingerprint == output.plan["fingerprint"]


def test_a_run_that_goes_on_with_others_says_so_once(
    tmp_path: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=5)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.worker.versions", lambda: {**versions(), "torch": "2.6.0"})
        output, _ = commit_plain(spec)
    own = Path(output.own.root)
    records = sorted(own.glob("records/*.json"))
    assert json.loads(records[0].read_text())["made_with"].count("torch 2.6.0") == 1
    records[-1].unlink()
    old = json.loads(records[0].read_text())
    del old["made_with"]  # of older code, which recorded none
    records[0].write_text(json.dumps(old))
    said: list[Progress] = []
    assert run(spec, resources=Resources(cpus=0.5), progress=said.append).state == "complete"
    messages = [one.message for one in said if one.message and "torch" in one.message]
    assert len(messages) == 1
    assert f"2 shards were made with torch 2.6.0, the others will be with torch {version('torch')}" in messages[0]
    card = (tmp_path / "out/README.md").read_text()
    assert "## Versions" in card
    lines = [line for line in card.splitlines() if ", torch " in line]
    assert [line.split()[:3] for line in sorted(lines)] == [["-", "1", "files:"], ["-", "2", "files:"]]
