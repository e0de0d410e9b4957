"""A step of a chain: the content of any other kind's job file, plus a ``name``."""

from __future__ import annotations

from functools import cache
from typing import Annotated

from pydantic import Field, create_model

from jobs.schema import registry
from jobs.schema.base import Job

STEP_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
StepName = Annotated[str, Field(pattern=f"^{STEP_NAME}$")]


@cache
def step_model(kind: str) -> type[Job]:
    """A kind's model with the field ``name``."""
    base = registry.find(kind)
    return create_model(f"{base.__name__}Step", __base__=base, __module__=__name__, name=(StepName, ...))


def step_kinds() -> list[str]:
    """The kinds a step can have: all but ``chain`` itself."""
    return [kind for kind in registry.kinds() if kind != "chain"]
