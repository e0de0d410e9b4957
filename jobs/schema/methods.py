"""What the jobs share that map each row by several methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar


class _Labelled(Protocol):
    @property
    def label(self) -> str: ...


M = TypeVar("M", bound=_Labelled)


def listed(value: Any) -> Any:
    """The short forms: one method for a list of one, a plain string for ``{method: ...}``."""
    if isinstance(value, (str, Mapping)):
        value = [value]
    return [{"method": one} if isinstance(one, str) else one for one in value]


def distinct(methods: tuple[M, ...]) -> tuple[M, ...]:
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
