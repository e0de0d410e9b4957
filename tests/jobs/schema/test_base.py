"""What every job file has in common."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import ValidationError

from jobs.schema.base import Input, Resources, RowJob, Workers
from pipeline.contract import StageSpec


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


def test_values_cannot_be_changed_after_validation(toy_job: type[RowJob]) -> None:
    job = toy_job(input="a")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 3  # type: ignore[misc]


def test_own_settings_are_the_fields_that_are_not_common(toy_job: type[RowJob]) -> None:
    job = toy_job.model_validate({"input": "a", "output": "b", "seed": 3, "mode": "lower", "resources": {"cpus": 4}})
    assert job.own_settings() == {"job": "toy", "mode": "lower", "factor": 1.0}


def test_a_job_without_a_stage_says_so() -> None:
    class Silent(RowJob):
        job: Literal["silent"] = "silent"

    with pytest.raises(NotImplementedError, match="Silent"):
        Silent.model_validate({"input": "a"}).stage()
    assert StageSpec  # the return type that subclasses promise
