"""Settings of methods, for stages that map each row by several of them. Plain models; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.contract import Settings


class Method(Settings):
    """Base of every method's settings. A method has a field `method`, a `Literal` of its own name."""

    name: str = ""
    """What rows of this method are called in the column ``method``. Left out: the method's own name."""

    @property
    def label(self) -> str:
        method: str = getattr(self, "method", "")
        return self.name or method


M = TypeVar("M", bound=Method)


def _listed(value: Any) -> Any:
    """The short forms: one method for a list of one, a plain string for ``{method: ...}``."""
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, (list, tuple)):  # what should be a list, pydantic says
        return value
    return [{"method": one} if isinstance(one, str) else one for one in value]


def _distinct(methods: tuple[M, ...]) -> tuple[M, ...]:
    """The methods, whose labels tell rows apart and end their ids.

    Raises:
        ValueError: Two have one label, or a label holds a slash.
    """
    labels = [method.label for method in methods]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"two are called {twice[0]!r}; give each a `name` of its own")
    if any("/" in label for label in labels):
        raise ValueError("a `name` must not contain a slash")
    return methods


Methods = Annotated[tuple[M, ...], Field(min_length=1), BeforeValidator(_listed), AfterValidator(_distinct)]
"""A list of methods with labels of their own, in the short forms of a job file too: ``Methods[AnyMethod]``."""
