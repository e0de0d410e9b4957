"""Chains: names, references and inheritance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.kinds.chain import Chain, read_listing, write_listing
from jobs.run import run_job
from jobs.schema import reading
from jobs.schema.base import RowJob
from jobs.schema.reading import JobFileError
from pipeline.output.planfile import OutputError


def chain(*steps: dict[str, Any], **keys: Any) -> Chain:
    job = reading.load({"job": "chain", "steps": list(steps), **keys})
    assert isinstance(job, Chain)
    return job


FIRST = {"name": "first", "job": "toy", "input": "a.txt"}


def test_a_step_without_input_reads_the_one_before(toy_job: type[RowJob]) -> None:
    steps = dict(chain(FIRST, {"name": "second", "job": "toy"}, seed=5).named_steps("out"))
    assert steps["second"].input.path == ("out/first",)  # type: ignore[attr-defined]
    assert [step.output for step in steps.values()] == ["out/first", "out/second"]
    assert [step.seed for step in steps.values()] == [5, 5]  # type: ignore[attr-defined]


def test_a_reference_must_name_an_earlier_step(toy_job: type[RowJob]) -> None:
    with pytest.raises(JobFileError, match="names no earlier step"):
        chain(FIRST, {"name": "second", "job": "toy", "input": "${third}"})


def test_steps_take_the_chains_storage_options(toy_job: type[RowJob]) -> None:
    own = {**FIRST, "name": "own", "storage_options": {"key": "own"}}
    steps = dict(chain(FIRST, own, storage_options={"key": "chain"}).named_steps("s3://bucket/out"))
    assert [step.storage_options for step in steps.values()] == [{"key": "chain"}, {"key": "own"}]


def test_a_listing_is_found_from_anywhere(
    tmp_path: Path, toy_job: type[RowJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = chain(FIRST, {**FIRST, "name": "second", "output": "elsewhere"}).named_steps("out/all")
    write_listing("out/all", list(steps))
    (tmp_path / "moved").mkdir()
    (tmp_path / "out/all").rename(tmp_path / "moved/here")
    monkeypatch.chdir("/")
    found = read_listing(f"{tmp_path}/moved/here")
    assert found is not None
    assert [step["output"] for step in found] == [f"{tmp_path}/moved/here/first", f"{tmp_path}/elsewhere"]


def test_a_listing_of_older_code_is_found_from_another_directory(tmp_path: Path) -> None:
    """It held paths as they were typed."""
    (tmp_path / "chain.json").write_text('{"steps": [{"name": "one", "job": "toy", "output": "out/typed/one"}]}')
    plan = tmp_path / "one/_latentmill/plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text("{}")
    assert read_listing(str(tmp_path)) == [{"name": "one", "job": "toy", "output": f"{tmp_path}/one"}]


def test_a_damaged_listing_is_told_in_a_sentence(tmp_path: Path) -> None:
    strange = json.dumps({"steps": [{"name": "\x1b]0;mine\x07", "job": "toy", "output": "one"}]})
    for damaged in ('{"steps": [', "[]", '{"steps": [{"name": "one"}]}', strange):
        (tmp_path / "chain.json").write_text(damaged)
        with pytest.raises(OutputError, match="run the chain again") as told:
            read_listing(str(tmp_path))
        assert str(told.value).isprintable()


def test_a_refused_chain_leaves_the_listing_of_another(
    tmp_path: Path, toy_job: type[RowJob], local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "a.txt"
    rows.write_text("one\n")
    listed = tmp_path / "out/chain.json"
    first = {**FIRST, "input": str(rows), "resources": {"cpus": 0.5}}
    assert run_job({"job": "chain", "steps": [first]}, output=str(tmp_path / "out")).state == "complete"
    before = listed.read_text()
    other = {**first, "input": str(tmp_path / "gone.txt"), "name": "other"}
    with pytest.raises(ValueError, match="gone"):
        run_job({"job": "chain", "steps": [other]}, output=str(tmp_path / "out"))
    assert listed.read_text() == before


def test_names_are_unique(toy_job: type[RowJob]) -> None:
    with pytest.raises(JobFileError, match="its own name"):
        chain(FIRST, FIRST)
