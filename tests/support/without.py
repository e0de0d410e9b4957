"""Run Python as on a machine that lacks some packages: ``python -m tests.support.without ray,datasets MODULE [ARGUMENT
...]`` runs a module as ``python -m`` does, and whatever then imports one of the packages fails."""

from __future__ import annotations

import importlib.abc
import runpy
import sys
from collections.abc import Iterable
from typing import Any


class Missing(importlib.abc.MetaPathFinder):
    """Finds none of these packages."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        package = name.partition(".")[0]
        if package in self.packages:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


if __name__ == "__main__":
    sys.meta_path.insert(0, Missing(sys.argv[1].split(",")))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
