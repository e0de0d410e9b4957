"""Versions of what a result depends on beside its settings and models; read from the installed packages, loads none."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

NAMED = {
    "latentmill": ("latentmill",),
    "torch": ("torch",),
    "diffusers": ("diffusers",),
    "transformers": ("transformers",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"),
    "pyarrow": ("pyarrow",),
}
"""What is recorded -> distributions that bring it."""


@cache
def versions() -> dict[str, str]:
    """Name -> version of what is installed here."""
    found = {name: _first(distributions) for name, distributions in NAMED.items()}
    return {name: number for name, number in found.items() if number is not None}


def _first(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def told(known: dict[str, str]) -> str:
    """``latentmill 0.1.0, torch 2.13.0, ...``: how records and cards say it."""
    return ", ".join(f"{name} {number}" for name, number in known.items())


def differing(one: str, other: str) -> tuple[str, str]:
    """What of the first is not in the second, and the other way round."""
    ours, theirs = one.split(", "), other.split(", ")
    return (
        ", ".join(part for part in ours if part not in theirs) or "nothing of these",
        ", ".join(part for part in theirs if part not in ours) or "nothing of these",
    )
