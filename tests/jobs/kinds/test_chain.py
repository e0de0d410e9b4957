"""Chains: names, references and inheritance."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.kinds.chain import Chain
from jobs.schema import reading
from jobs.schema.base import RowJob
from jobs.schema.reading import JobFileError


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


def test_names_are_unique(toy_job: type[RowJob]) -> None:
    with pytest.raises(JobFileError, match="its own name"):
        chain(FIRST, FIRST)
