"""The JSON schema takes what validation takes, and says what each key means."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.commands.init import EXAMPLES
from jobs.schema import reading
from jobs.schema.base import RowJob
from jobs.schema.json_schema import job_schema
from jobs.schema.reading import JobFileError


def test_the_schema_accepts_what_validation_accepts(tmp_path: Path, toy_job: type[RowJob]) -> None:
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
        reading.load(data, ["steps.toy.name=two"] if data["job"] == "chain" else [])
    for data in bad:
        assert not check.is_valid(data), data
        with pytest.raises(JobFileError):
            reading.load(data)


def deepest(check: jsonschema.Draft202012Validator, data: object) -> list[str]:
    """What the schema says against some data, with the kinds that they are not left out."""
    inner = [one for error in check.iter_errors(data) for one in (error.context or [error])]
    most = max((len(one.absolute_path) for one in inner), default=0)
    return [f"{one.json_path}: {one.message[:200]}" for one in inner if len(one.absolute_path) == most]


def test_the_schema_accepts_every_shipped_job_file() -> None:
    """As they stand, short forms too: an editor underlines nothing in them."""
    check = jsonschema.Draft202012Validator(json.loads(json.dumps(job_schema())))
    said = {}
    for file in sorted(EXAMPLES.glob("*.yaml")):
        data = yaml.safe_load(file.read_text())
        if file.name.startswith("compbench"):  # whose input its own command writes
            data = {"input": "prompts.jsonl", **data}
        if not check.is_valid(data):
            said[file.name] = deepest(check, data)
    assert said == {}


@pytest.mark.parametrize(
    ("part", "fits"),
    [
        ({"methods": "lbo"}, True),
        ({"methods": ["ddim", {"method": "lbo", "passes": 3}]}, True),
        ({"methods": {"method": "ddim"}}, True),
        ({"methods": []}, False),
        ({"methods": "lbi"}, False),
        ({"methods": [{"method": "lbo", "passs": 3}]}, False),
    ],
)
def test_short_forms_of_methods(part: dict[str, object], fits: bool) -> None:
    check = jsonschema.Draft202012Validator(json.loads(json.dumps(job_schema())))
    job = {"job": "invert-images", "input": "pictures", "model": "micro:stable-diffusion", **part}
    assert check.is_valid(job) == fits
    if fits:
        reading.load(job)
    else:
        with pytest.raises(JobFileError):
            reading.load(job)


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
