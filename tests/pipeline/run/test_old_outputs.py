"""Outputs that older code planned go on: they are verified, resumed to equal bytes, refused where they differ.

``old_outputs/`` was written by commit 7532baf, from the job below: ``finished`` by a run that completed, ``half`` by
one that was stopped after two of its three shards. Its stage lay in another module then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.report import write_report
from jobs.run import run_job, run_spec
from jobs.schema.reading import load
from pipeline.contract import Column, Row, StageInfo
from pipeline.output.dataset import Output
from pipeline.output.verify import verify
from pipeline.run.draft import RunSpec
from pipeline.run.plan import PlanMismatch, differences, make_plan
from tests.support.in_process import without_ray
from tests.support.toy_job import Letters, Toy

OLD = Path(__file__).parent / "old_outputs"
JOB: dict[str, Any] = {
    "job": "toy", "input": {"path": "micro-world://heldout?rows=20&seed=3", "columns": {"text": "caption"}},
    "factor": 2.0, "shard_rows": 8, "seed": 5, "keep": ["text"],
}  # fmt: skip


@pytest.fixture
def old(tmp_path: Path, toy_job: type[Toy]) -> Path:
    """Copies of the old outputs, to be gone on with."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def spec(output: Path) -> RunSpec:
    job = load(JOB)
    assert isinstance(job, Toy)
    return run_spec(job, str(output))


def plan_of(output: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((output / "_latentmill/plan.json").read_text())
    return plan


def test_a_stage_that_was_moved_keeps_its_name_and_fingerprint(tmp_path: Path, toy_job: type[Toy]) -> None:
    new = spec(tmp_path / "new")
    assert new.stage.target == "tests.support.toy_job:Letters"
    assert new.stage.name == "tests.toy_job:Letters"
    assert make_plan(new).fingerprint == plan_of(OLD / "finished")["fingerprint"]


def test_a_finished_output_is_verified_found_complete_and_reported(old: Path) -> None:
    report = verify(str(old / "finished"))
    assert (report.ok, report.found, report.rows_ok) == (True, 20, 20), report.problems
    before = {path: path.read_bytes() for path in (old / "finished/data").iterdir()}
    result = run_job(JOB, output=str(old / "finished"))
    assert (result.state, result.resumed, result.measures["length"]["n"]) == ("complete", 3, 20)
    assert {path: path.read_bytes() for path in (old / "finished/data").iterdir()} == before
    assert plan_of(old / "finished") == plan_of(OLD / "finished")
    page = Path(str(write_report(str(old / "finished")))).read_text()
    assert "20" in page
    assert "length" in page


def test_a_half_finished_output_is_completed_with_equal_bytes(old: Path, local_ray: str) -> None:
    assert not verify(str(old / "half")).ok
    result = run_job(JOB, output=str(old / "half"))
    assert (result.state, result.resumed, result.ok) == ("complete", 2, 20)
    assert verify(str(old / "half")).ok
    assert plan_of(old / "half") == plan_of(OLD / "half")
    assert json.loads((old / "half/_SUCCESS").read_text()) == json.loads((OLD / "finished/_SUCCESS").read_text())
    parts = sorted(path.name for path in (OLD / "finished/data").iterdir())
    assert sorted(path.name for path in (old / "half/data").iterdir()) == parts
    for name in parts:
        made, expected = old / "half/data" / name, OLD / "finished/data" / name
        assert pq.read_table(made).equals(pq.read_table(expected), check_metadata=True)
        if pq.read_metadata(made).created_by == pq.read_metadata(expected).created_by:
            assert made.read_bytes() == expected.read_bytes()
    records = [(r.shard, r.checksum, r.rows_ok) for r in Output.open(str(old / "half")).records()]
    assert records == [(r.shard, r.checksum, r.rows_ok) for r in Output.open(str(OLD / "finished")).records()]


def test_a_column_that_the_stage_has_gained_since_is_not_written(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def described(mode: str, factor: float) -> StageInfo:
        info = before(mode, factor)
        return replace(info, columns=(Column("newer", "int64"), *info.columns))

    def called(self: Letters, rows: Iterable[Row]) -> Iterator[Row]:
        return ({**row, "newer": 1} for row in process(self, rows))

    before, process = Letters.describe, Letters.__call__
    monkeypatch.setattr(Letters, "describe", staticmethod(described))
    monkeypatch.setattr(Letters, "__call__", called)
    without_ray(monkeypatch)
    result = run_job(JOB, output=str(old / "half"))
    assert (result.state, result.resumed, result.ok) == ("complete", 2, 20)
    for part in (OLD / "finished/data").iterdir():
        assert pq.read_table(old / "half/data" / part.name).equals(pq.read_table(part), check_metadata=True)
    again = run_job(JOB, output=str(old / "new"))
    assert "newer" in pq.read_table(next(Path(again.output, "data").iterdir())).column_names
    monkeypatch.setattr(Letters, "describe", staticmethod(before))
    with pytest.raises(PlanMismatch, match="output columns"):  # one that is gone is another matter
        run_job(JOB, output=str(old / "new"))


@pytest.mark.parametrize("change", [{"factor": 3.0}, {"seed": 6}, {"keep": []}, {"shard_rows": 10}])
def test_a_real_difference_is_refused(old: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PlanMismatch, match=next(iter(change))):
        run_job(JOB | change, output=str(old / "half"))
    assert plan_of(old / "half") == plan_of(OLD / "half")


def test_an_option_that_is_new_since_differs_only_when_it_is_used(old: Path) -> None:
    fields = plan_of(old / "half")["fields"]
    assert differences(fields, fields | {"config.newer": None, "stage.newer": None}) == {}
    assert differences(fields | {"config.newer": None}, fields) == {}
    used = fields | {"config.newer": "yes", "stage.newer": "yes"}
    assert differences(fields, used) == {"config.newer": (None, "yes")}
    methods = {"config.methods": [{"name": "a", "steps": 3}]}
    assert differences(methods, {"config.methods": [{"name": "a", "steps": 3, "newer": None}]}) == {}
    assert differences(methods, {"config.methods": [{"name": "a", "steps": 3, "newer": 1}]}) != {}
    stranger = replace(spec(old / "half").stage, target="tests.support.faulty:Numbers")
    assert differences(fields, fields | {"stage": stranger.name}).keys() == {"stage"}
