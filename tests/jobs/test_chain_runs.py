"""Chains that run: each step reads what one before it wrote; the whole resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.kinds.chain import Chain
from jobs.run import run_job
from jobs.schema import reading
from jobs.schema.base import RowJob
from jobs.schema.reading import JobFileError
from pipeline.output.progress import Progress

SMALL = {"cpus": 0.5}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Row {n}"}) for n in range(7)))
    return str(path)


def test_references_resolve_to_the_folders_of_their_steps(toy_job: type[RowJob]) -> None:
    steps = [
        {"job": "toy", "name": "one", "input": "a", "seed": 9},
        {"job": "toy", "name": "two"},
        {"job": "toy", "name": "three", "input": "${one}", "keep": ["${two}/x"], "output": "elsewhere"},
        {"job": "toy", "name": "four", "input": {"path": ["${three}"], "columns": {"text": "changed"}}},
    ]
    chain = reading.load({"job": "chain", "steps": steps, "seed": 5, "resources": {"workers": 3}})
    assert isinstance(chain, Chain)
    named = dict(chain.named_steps("OUT/"))
    assert [step.output for step in named.values()] == ["OUT/one", "OUT/two", "elsewhere", "OUT/four"]
    found = {name: step for name, step in named.items() if isinstance(step, toy_job)}
    assert [step.input.path for step in found.values()] == [("a",), ("OUT/one",), ("OUT/one",), ("elsewhere",)]
    assert [step.seed for step in found.values()] == [9, 5, 5, 5]
    assert found["three"].keep == ("OUT/two/x",)
    assert {step.resources.workers.max for step in found.values()} == {3}


def test_a_step_alone_and_in_a_chain_have_the_same_settings(toy_job: type[RowJob]) -> None:
    """The name of a step is no setting of its job: renaming must not refuse to resume."""
    chain = reading.load({"job": "chain", "steps": [{"job": "toy", "name": "one", "input": "a", "mode": "lower"}]})
    assert isinstance(chain, Chain)
    (_, step), *_ = chain.named_steps("OUT")
    assert isinstance(step, RowJob)
    assert step.own_settings() == toy_job.model_validate({"input": "a", "mode": "lower"}).own_settings()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"job": "toy", "input": "${two}"}], "steps[0].input: ${two} names no earlier step. No step comes before it."),
        (
            [{"job": "toy", "input": "a"}, {"job": "toy", "name": "b", "keep": ["${b}"]}],
            "steps[1].keep[0]: ${b} names no earlier step. Steps before it: toy.",
        ),
        ([{"job": "toy", "name": "a/b", "input": "a"}], "steps[0].name"),
        ([{"job": "toi", "input": "a"}], "steps[0].job: unknown kind of job 'toi'. Did you mean 'toy'?"),
        ([{"job": "chain", "steps": []}], "steps[0].job: unknown kind of job 'chain'."),
        ([{"job": "toy", "input": "a", "sead": 1}], "steps[0].sead: unknown key. Did you mean 'seed'?"),
        ([{"job": "toy"}], "steps[0].input: this key is required."),
        ([], "steps: [] will not do"),
        (["toy"], "steps[0]: which job? The key is missing."),
    ],
)
def test_mistakes(toy_job: type[RowJob], steps: list[Any], said: str) -> None:
    with pytest.raises(JobFileError) as caught:
        reading.load({"job": "chain", "steps": steps})
    assert said in str(caught.value)


def test_a_chain_runs_resumes_and_reports(
    tmp_path: Path, rows: str, toy_job: type[RowJob], local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps = [
        {"job": "toy", "name": "upper", "input": rows},
        {"job": "toy", "name": "lower", "mode": "lower", "input": {"path": "${upper}", "columns": {"text": "changed"}}},
    ]
    job = {"job": "chain", "steps": steps, "resources": SMALL}
    said: list[Progress] = []
    with monkeypatch.context() as patch:  # the second step cannot be built at first
        patch.setattr("tests.support.toy_job.Letters.describe", _only_upper())
        with pytest.raises(ValueError, match="no lower") as caught:
            run_job(job, output=str(out))
        assert "in step 'lower' of the chain" in getattr(caught.value, "__notes__", [])
    assert (out / "upper/_SUCCESS").exists()
    result = run_job(job, output=str(out), progress=said.append)
    assert (result.state, result.planned, result.ok, result.resumed) == ("complete", 14, 14, 1)
    assert list(result.steps) == ["upper", "lower"]
    assert next(s.message for s in said if s.message) == f"step 1 of 2: upper (toy) -> {out}/upper"
    table = pyarrow.dataset.dataset(sorted((out / "lower/data").glob("*.parquet"))).to_table()
    assert table["changed"].to_pylist() == [f"row {n}" for n in range(7)]
    first = pyarrow.dataset.dataset(sorted((out / "upper/data").glob("*.parquet"))).to_table()
    assert table["id"].to_pylist() == first["id"].to_pylist()
    page = (out / "report.html").read_text()
    assert 'href="upper/report.html"' in page
    assert 'href="lower/report.html"' in page
    _check_commands(out)


def test_a_chain_grows_with_its_limit(
    tmp_path: Path, rows: str, toy_job: type[RowJob], local_ray: str
) -> None:  # fmt: skip
    """Every step does its further rows alone: the files of the one before have stayed as they were."""
    steps = [
        {"job": "toy", "name": "upper", "input": rows},
        {"job": "toy", "name": "lower", "mode": "lower", "input": {"path": "${upper}", "columns": {"text": "changed"}}},
    ]
    job = {"job": "chain", "steps": steps, "resources": SMALL}
    for limit, resumed in ((2, 0), (5, 2), (None, 4)):
        result = run_job(job, output=str(tmp_path / "out"), limit=limit)
        count = limit or 7
        assert (result.state, result.planned, result.ok, result.resumed) == ("complete", 2 * count, 2 * count, resumed)
        table = pyarrow.dataset.dataset(sorted((tmp_path / "out/lower/data").glob("*.parquet"))).to_table()
        assert table["changed"].to_pylist() == [f"row {n}" for n in range(count)]
    _check_commands(tmp_path / "out")


def _only_upper() -> Any:
    from tests.support.toy_job import Letters

    describe = Letters.describe

    def refuse(mode: str, factor: float) -> Any:
        if mode == "lower":
            raise ValueError("no lower case today")
        return describe(mode, factor)

    return staticmethod(refuse)


def _check_commands(out: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["status", str(out)]).output.splitlines()[0].startswith("upper: complete")
    assert set(json.loads(runner.invoke(app, ["status", str(out), "--json"]).output)) == {"upper", "lower"}
    assert json.loads(runner.invoke(app, ["verify", str(out), "--json"]).output)["ok"] is True
    (out / "lower/_SUCCESS").unlink()
    assert runner.invoke(app, ["verify", str(out)]).exit_code == 1
    assert "lower: incomplete" in runner.invoke(app, ["status", str(out)]).output
    assert runner.invoke(app, ["report", str(out)]).output.strip() == f"{out}/report.html"


def test_a_dry_run_plans_what_can_be_planned(tmp_path: Path, rows: str, toy_job: type[RowJob]) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(f"job: chain\nsteps:\n- {{job: toy, name: one, input: {rows}}}\n- {{job: toy, name: two}}\n")
    done = CliRunner().invoke(app, ["run-job", str(path), "-o", str(tmp_path / "out"), "--dry-run", "--json"])
    one, two = json.loads(done.output)
    assert one["plan"]["rows"] == 7
    assert two["plan"] is None
    assert two["why"] == f"reads {tmp_path}/out/one, which is not there yet"
