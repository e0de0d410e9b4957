"""``chain``: jobs one after another, each reading what one before it wrote.

A step is the content of a job file plus a ``name``. It writes to ``OUT/<name>`` unless it says otherwise.
``${name}`` in any string of a later step stands for that folder, and a step without ``input`` reads the step before
it. Each step resumes by itself, so the chain does: finished steps are recognised by their fingerprints and skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from jobs.schema import registry
from jobs.schema.base import Job, Resources
from jobs.schema.concept_input import absolute
from jobs.schema.steps import STEP_NAME, step_kinds, step_model
from pipeline.output.planfile import PLAN, OutputError
from pipeline.storage import Folder

CHAIN_FILE = "chain.json"
"""What a chain leaves in its own folder: where its steps write."""

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


def _problem(message: str, value: Any, *where: str | int) -> InitErrorDetails:
    error = PydanticCustomError("chain", "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=where, input=value)


def _parse_step(raw: Any) -> Any:
    if isinstance(raw, Job):
        return raw
    kind = raw.get("job") if isinstance(raw, Mapping) else None
    if kind not in step_kinds():
        message = registry.unknown_kind(kind, step_kinds())
        raise ValidationError.from_exception_data("Step", [_problem(message, kind, "job")])
    return step_model(kind).model_validate(raw)


def _strings(value: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, (*where, key))
    elif isinstance(value, Sequence):
        for index, inner in enumerate(value):
            yield from _strings(inner, (*where, index))


def substitute(value: Any, outputs: Mapping[str, str]) -> Any:
    """The value with every ``${name}`` in its strings replaced by the output folder of that step."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: outputs[match[1].strip()], value)
    if isinstance(value, Mapping):
        return {key: substitute(inner, outputs) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [substitute(inner, outputs) for inner in value]
    return value


class Chain(Job):
    job: Literal["chain"] = "chain"
    steps: tuple[Annotated[SerializeAsAny[Job], BeforeValidator(_parse_step)], ...] = Field(min_length=1)
    """The jobs, in order. Each has the keys of its own kind, and ``name``."""
    seed: int | None = Field(None, ge=0)
    """Seed of the steps that give none."""
    resources: Resources | None = None
    """Resources of the steps that give none."""

    @field_validator("steps", mode="before")
    @classmethod
    def _complete(cls, steps: Any) -> Any:
        """Fill in names and inputs, and check that references point back to steps that exist."""
        if not isinstance(steps, (list, tuple)):
            return steps
        complete: list[Any] = []
        names: list[str] = []
        problems: list[InitErrorDetails] = []
        for index, step in enumerate(steps):
            if not isinstance(step, Mapping):
                complete.append(step)
                continue
            step = {"name": step.get("job"), **step}
            if names and "input" not in step and _reads_rows(step.get("job")):
                step["input"] = f"${{{names[-1]}}}"
            for where, text in _strings(step):
                for name in _REFERENCE.findall(text):
                    if name.strip() not in names:
                        known = f"Steps before it: {', '.join(names)}." if names else "No step comes before it."
                        problems.append(_problem(f"${{{name}}} names no earlier step. {known}", text, index, *where))
            if step["name"] in names:
                message = f"two steps are called {step['name']!r}; give each its own name"
                problems.append(_problem(message, step["name"], index, "name"))
            names.append(str(step["name"]))
            complete.append(step)
        if problems:
            raise ValidationError.from_exception_data("Chain", problems)
        return complete

    def named_steps(self, output: str) -> Iterator[tuple[str, Job]]:
        """Each step with its references resolved and its output folder set, below `output`."""
        outputs: dict[str, str] = {}
        for step in self.steps:
            raw = step.model_dump(mode="json", exclude_unset=True)
            name = raw["name"]
            inherited = {
                "seed": self.seed,
                "resources": self.resources and self.resources.model_dump(mode="json"),
                "storage_options": self.storage_options or None,
            }
            for key, value in inherited.items():
                if value is not None and key in type(step).model_fields:
                    raw.setdefault(key, value)
            raw = substitute({**raw, "job": step.job}, outputs)
            raw.setdefault("output", f"{output.rstrip('/')}/{name}")
            outputs[name] = raw["output"]
            yield name, step_model(step.job).model_validate(raw)


def _reads_rows(kind: Any) -> bool:
    return kind in step_kinds() and "input" in registry.find(kind).model_fields


def write_listing(output: str, steps: Sequence[tuple[str, Job]]) -> None:
    """Leave in the chain's folder which steps it has, and where they write: below it by the name alone, so that the
    folder may move; elsewhere in full, so that it is found from any working directory.
    """

    def place(step: Job) -> str:
        target, above = absolute(str(step.output)), absolute(output)
        return target.removeprefix(f"{above}/")

    listing = {"steps": [{"name": name, "job": step.job, "output": place(step)} for name, step in steps]}
    Folder.at(output).write(CHAIN_FILE, json.dumps(listing, indent=2).encode())


def read_listing(output: str) -> list[dict[str, str]] | None:
    """``name``, ``job`` and ``output`` of a chain's steps; None where the folder holds no chain.

    Raises:
        OutputError: The listing is damaged.
    """
    folder = Folder.at(output)
    if not folder.exists(CHAIN_FILE):
        return None
    try:
        steps: list[dict[str, str]] = [
            {"name": _named(step["name"]), "job": str(step["job"]), "output": _found(output, step)}
            for step in json.loads(folder.read(CHAIN_FILE))["steps"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{output.rstrip('/')}/{CHAIN_FILE} is damaged ({error}); run the chain again"
        raise OutputError(problem) from None
    return steps


def _named(name: str) -> str:
    """A step's name as a chain may have written it; it is shown, and stands for a folder.

    Raises:
        ValueError: No chain has such a step.
    """
    if not re.fullmatch(STEP_NAME, name):
        raise ValueError(f"no step is called {name[:40]!r}")
    return name


def _found(output: str, step: Mapping[str, str]) -> str:
    """Where a step writes. Older code left paths as they were typed, relative to a directory that nobody knows now."""
    place, above = step["output"], output.rstrip("/")
    if "://" in place or place.startswith("/"):
        return place
    below = (f"{above}/{place}", f"{above}/{step['name']}", place)
    return next((found for found in below if Folder.at(found).exists(PLAN)), below[0])
