"""What `--dry-run` says of settings that a file does not name, fed back into the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.kinds.chain import Chain
from jobs.schema import reading, registry
from jobs.schema.base import Job
from jobs.schema.defaults import as_yaml, unnamed
from jobs.schema.steps import step_model
from pipeline.contract import as_job_file
from tests.support import ROOT

EXAMPLES = sorted((Path(ROOT) / "jobs/examples").glob("*.yaml"))
SHORT: dict[str, dict[str, Any]] = {
    "reference": {"encoder": "m", "captions": True, "input": ["a", "b"], "resources": {"workers": {"max": None}}},
    "invert-images": {"methods": "lbo"},
    "select-corpus": {"encoder": "m", "score_column": None},
    "rare-concepts": {"methods": ["random", {"method": "nao", "blend": {}}], "anchors": "out/reference"},
    "learn-concepts": {"samples": {"subjects": ["cat"]}, "prompts": {"with": "{subject} {concept}"}},
    "judge-corpus": {"real": "r", "corpora": {"a": "b"}},
    "invert-prompts": {"methods": ["direct"], "reference": "out/reference", "decode": {"steps": 3}},
}


def jobs() -> list[Any]:
    found: list[Any] = []
    for path in EXAMPLES:
        lacking = [] if "input:" in path.read_text() else ["input=a"]  # a command gives it
        found.append(pytest.param(reading.load(path, lacking), id=path.stem))
    told = [{"job": kind, "input": "a", **given} for kind, given in SHORT.items()]
    return found + [pytest.param(reading.load(given), id=f"short {given['job']}") for given in told]


def steps(job: Job) -> list[Job]:
    return list(job.steps) if isinstance(job, Chain) else [job]


def merged(named: Any, more: Any) -> Any:
    """What a user gets who writes the lines into the file: blocks grow, all else is replaced."""
    if isinstance(named, dict) and isinstance(more, dict):
        return {**named, **{key: merged(named.get(key), value) for key, value in more.items()}}
    return more


def validated(step: Job, content: dict[str, Any]) -> Job:
    model = step_model(step.job) if hasattr(step, "name") else registry.find(step.job)
    return model.model_validate(content)


@pytest.mark.parametrize("job", jobs())
def test_what_is_printed_is_yaml_and_changes_nothing_in_the_file(job: Job) -> None:
    for step in steps(job):
        printed = yaml.safe_load("\n".join(as_yaml(step))) or {}
        assert printed == unnamed(step)[0]
        named = step.model_dump(mode="json", exclude_unset=True) | {"job": step.job}
        again = validated(step, merged(named, printed))
        assert as_job_file(again) == as_job_file(step)
        assert again.model_dump(mode="json") == step.model_dump(mode="json")


@pytest.mark.parametrize("job", jobs())
def test_nothing_in_force_is_left_unsaid(job: Job) -> None:
    for step in steps(job):
        settings, left_out = unnamed(step)
        full = as_job_file(step)
        for name in type(step).model_fields.keys() - step.model_fields_set - {"job"}:
            key = {"with_": "with"}.get(name, name)
            value = full.get(key)
            assert (key in left_out) if value in (None, "", [], {}) else (key in settings)


def test_settings_that_the_file_names_are_not_repeated() -> None:
    job = reading.load({"job": "reference", "input": "a", "encoder": "m", "store": "float16", "resources": {"cpus": 4}})
    settings, left_out = unnamed(job)
    assert not {"job", "encoder", "store"} & settings.keys()
    assert settings["input"] == {"max_pixels": 100_000_000}
    assert settings["resources"] == {
        "workers": {"min": 1, "max": 1}, "gpus": 0.0, "decode_threads": 2, "encode_threads": 2, "sole_run": False,
    }  # fmt: skip
    assert {"revision", "batch_size", "captions", "resources.memory", "input.id"} <= set(left_out)
    assert "shrinkage: ledoit-wolf" in list(as_yaml(job))


def test_keys_of_stores_are_not_printed() -> None:
    job = reading.load({"job": "reference", "input": {"path": "a", "storage_options": {"key": "hush"}}, "encoder": "m",
                        "storage_options": {"secret": "hush"}})  # fmt: skip
    assert "hush" not in "\n".join(as_yaml(job))
