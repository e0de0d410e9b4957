"""Job files: what is taken, and what is said when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
from pydantic import ValidationError

from jobs.schema import reading as jobfile
from jobs.schema import registry
from jobs.schema.base import Input, JobBase, Resources, Workers
from jobs.schema.json_schema import job_schema
from jobs.schema.reading import JobFileError
from pipeline.contract import StageSpec
from pipeline.input.source import FORMATS
from tests.support import ROOT


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(JobFileError) as caught:
        jobfile.load(path, overrides)
    return str(caught.value)


def test_a_minimal_file_becomes_its_model_with_defaults(tmp_path: Path, toy_job: type[JobBase]) -> None:
    job = jobfile.load(write(tmp_path, "job: toy\ninput: rows.jsonl\n"))
    assert isinstance(job, toy_job)
    assert job.input == Input(path=("rows.jsonl",))
    assert (job.seed, job.shard_rows, job.keep, job.output) == (0, 1000, (), None)
    assert job.resources == Resources()


def test_short_forms_mean_the_same_as_the_long_ones() -> None:
    assert Input.model_validate("a/*.csv") == Input.model_validate({"path": ["a/*.csv"]})
    assert Input.model_validate(["a", "b"]) == Input(path=("a", "b"))
    assert Workers.model_validate(3) == Workers(min=3, max=3)
    assert Resources.model_validate({"memory": "2GB"}).memory == 2_000_000_000


def test_input_and_resources_reach_the_pipeline_unchanged() -> None:
    given = {"path": "x", "format": "csv", "columns": {"prompt": "caption"}, "id": "key", "max_pixels": 7}
    source = Input.model_validate(given).source()
    assert (source.path, source.format, source.columns, source.id, source.max_pixels) == (
        ("x",),
        "csv",
        {"prompt": "caption"},
        "key",
        7,
    )
    pool = Resources.model_validate(
        {"workers": {"min": 2, "max": None}, "cpus": 3, "gpus": 0.5, "memory": "1GB"}
    ).pool()
    assert (pool.min_workers, pool.max_workers, pool.cpus, pool.gpus, pool.memory) == (2, None, 3, 0.5, 10**9)


def test_every_mistake_is_told_with_line_key_and_remedy(tmp_path: Path, toy_job: type[JobBase]) -> None:
    text = """\
job: toy
input:
  path: rows.jsonl
  colums: {prompt: caption}
  format: parkett
mode: uper
sead: 3
factor: fast
resources:
  workers: {min: 3, max: 1}
"""
    path = write(tmp_path, text)
    lines = complaint(path).splitlines()
    assert lines[0].startswith(f"{path}, line 4: input.colums: unknown key. Did you mean 'columns'? Allowed here: ")
    assert lines[1].startswith(f"{path}, line 5: input.format: 'parkett' is not allowed. Did you mean 'parquet'?")
    assert all(name in lines[1] for name in FORMATS)
    assert lines[2].startswith(f"{path}, line 6: mode: 'uper' is not allowed. Did you mean 'upper'?")
    assert lines[3].startswith(f"{path}, line 7: sead: unknown key. Did you mean 'seed'?")
    assert lines[4].startswith(f"{path}, line 8: factor: 'fast' will not do: should be a valid number")
    assert lines[5] == f"{path}, line 10: resources.workers: max (1) is below min (3)"
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n", "is a mapping of keys to values, this one is a list"),
        ("job: [toy\n", "line 2: not valid YAML"),
        ("job: toy\ninput: a\nseed: 1\nseed: 2\n", "line 4: seed is given twice (first on 3)"),
        ("input: a\n", "which job? The key is missing. Allowed: "),
        ("job: toi\ninput: a\n", "line 1: job: unknown kind of job 'toi'. Did you mean 'toy'?"),
        ("job: toy\n", "line 1: input: this key is required."),
        ("job: toy\ninput: {path: []}\n", "line 2: input.path: [] will not do"),
        ("job: toy\ninput: a\nseed: -1\n", "line 3: seed: -1 will not do: should be greater than or equal to 0."),
        ("job: toy\ninput: a\nkeep: {a: b}\n", "line 3: keep"),
        ("job: toy\ninput: a\nresources: {gpu: 1}\n", "line 3: resources.gpu: unknown key. Did you mean 'gpus'?"),
        ("job: {a: b}\ninput: a\n", "unknown kind of job {'a': 'b'}"),
    ],
)
def test_single_mistakes(tmp_path: Path, toy_job: type[JobBase], text: str, said: str) -> None:
    assert said in complaint(write(tmp_path, text))


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "job: toy\n", "invert.yaml")
    assert "no such job file. Did you mean 'invert.yaml'?" in complaint(tmp_path / "inver.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in complaint(path)


def test_overrides_replace_nested_values(tmp_path: Path, toy_job: type[JobBase]) -> None:
    path = write(tmp_path, "job: toy\ninput: rows\nresources: {workers: 2}\n")
    changes = ["seed=7", "input.format=csv", "resources.workers.max=4", "keep=[a, b]", "factor=1e-3", "output=s3://b/o"]
    job = jobfile.load(path, changes)
    assert isinstance(job, toy_job)
    assert job.input == Input(path=("rows",), format="csv")
    assert (job.seed, job.keep, job.output, job.factor) == (7, ("a", "b"), "s3://b/o", 1e-3)
    assert job.resources.workers == Workers(min=1, max=4)
    assert "--set seed: write it as key=value" in complaint(path, "seed")
    assert "seeed: unknown key. Did you mean 'seed'?" in complaint(path, "seeed=3")


def test_overrides_reach_steps_by_name_and_by_number(tmp_path: Path, toy_job: type[JobBase]) -> None:
    text = "job: chain\nsteps:\n- {job: toy, name: one, input: a}\n- {job: toy, name: two}\n"
    path = write(tmp_path, text)
    chain = jobfile.load(path, ["steps.one.factor=3", "steps.1.factor=4"])
    assert [step.factor for step in chain.steps] == [3, 4]  # type: ignore[attr-defined]
    assert "no item 'tow' here. Did you mean 'two'?" in complaint(path, "steps.tow.factor=3")


def test_values_cannot_be_changed_after_validation(toy_job: type[JobBase]) -> None:
    job = toy_job(input="a")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 3  # type: ignore[misc]


def test_own_settings_are_the_fields_that_are_not_common(toy_job: type[JobBase]) -> None:
    job = toy_job.model_validate({"input": "a", "output": "b", "seed": 3, "mode": "lower", "resources": {"cpus": 4}})
    assert job.own_settings() == {"job": "toy", "mode": "lower", "factor": 1.0}


def test_the_schema_accepts_what_validation_accepts(tmp_path: Path, toy_job: type[JobBase]) -> None:
    schema = json.loads(json.dumps(job_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    good = [
        {"job": "toy", "input": "a"},
        {"job": "toy", "input": ["a", "b"], "resources": {"workers": 2, "memory": "8GB"}},
        {"job": "toy", "input": {"path": "a", "format": "csv"}, "resources": {"workers": {"min": 1, "max": None}}},
        {"job": "chain", "steps": [{"job": "toy", "name": "one", "input": "a"}, {"job": "toy"}]},
    ]
    bad = [
        {"input": "a"},
        {"job": "toy"},
        {"job": "toi", "input": "a"},
        {"job": "toy", "input": "a", "sead": 1},
        {"job": "toy", "input": {"path": "a", "format": "parkett"}},
        {"job": "chain", "steps": []},
        {"job": "chain", "steps": [{"job": "chain", "steps": []}]},
    ]
    for data in good:
        check.validate(data)
        jobfile.load(data, ["steps.toy.name=two"] if data["job"] == "chain" else [])
    for data in bad:
        assert not check.is_valid(data), data
        with pytest.raises(JobFileError):
            jobfile.load(data)


def test_every_field_of_every_kind_is_described() -> None:
    """Editors show these texts; a key without one is a riddle."""
    schema = job_schema()
    silent = [
        f"{name}.{key}"
        for name, definition in schema["$defs"].items()
        for key, entry in {**definition, **definition.get("anyOf", [{}])[-1]}.get("properties", {}).items()
        if key not in ("job", "method", "name", "min", "max") and "description" not in entry and "$ref" not in entry
    ]
    assert silent == []


def test_shipped_job_files_are_valid() -> None:
    folder = ROOT / "jobs" / "examples"
    found = sorted(folder.glob("*.yaml"))
    assert any(path.name == "quickstart.yaml" for path in found)
    for path in found:
        needs_input = "input:" not in path.read_text()  # those of `compbench`, which brings the prompt sets
        jobfile.load(path, ["input=prompts.jsonl"] if needs_input else [])


def test_a_kind_without_a_module_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "ghost", "jobs.ghost:Ghost")
    assert "ghost" not in registry.kinds()
    with pytest.raises(KeyError):
        registry.find("ghost")


def test_a_job_without_a_stage_says_so() -> None:
    class Silent(JobBase):
        job: Literal["silent"] = "silent"

    with pytest.raises(NotImplementedError, match="Silent"):
        Silent.model_validate({"input": "a"}).stage()
    assert StageSpec  # the return type that subclasses promise
