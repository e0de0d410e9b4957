"""The Python blocks of Markdown pages, run as a reader would run them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support import ROOT

OURS = frozenset({"latentmill", "jobs", "pipeline", "stages", "index", "micro", "tests", "benchmarks"})

_RUN = """
import importlib.abc, json, os, sys, traceback

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {ours!r}:
            raise ModuleNotFoundError(f"a snippet that claims to need nothing of ours needs {{name}}")

if {alone!r}:
    sys.meta_path.insert(0, Refused())
else:
    import pytest
    from tests.support.in_process import without_ray
    without_ray(pytest.MonkeyPatch())
for number, (code, folder) in enumerate(json.loads(sys.stdin.read())):
    os.chdir(folder)
    try:
        exec(compile(code, f"snippet {{number}}", "exec"), {{"__name__": "snippet"}})
    except BaseException:
        print("-----", code, traceback.format_exc(), sep="\\n")
        sys.exit(1)
"""


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def needs_us(code: str) -> bool:
    """Whether a block says itself that it imports something of this project."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        if OURS & {name.partition(".")[0] for name in names}:
            return True
    return False


def run(snippets: Sequence[tuple[str, Path]]) -> None:
    """Run blocks, each in its folder; those that import nothing of ours in a process that refuses to import it.

    Raises:
        AssertionError: One fails; the message holds it.
    """
    for ours in (False, True):
        chosen = [(code, str(folder)) for code, folder in snippets if needs_us(code) == ours]
        if not chosen:
            continue
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = str(ROOT) if ours else ""
        done = subprocess.run(
            [sys.executable, "-c", _RUN.format(ours=OURS, alone=not ours)], input=json.dumps(chosen), text=True,
            capture_output=True, env=environment, check=False, cwd=chosen[0][1],
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
