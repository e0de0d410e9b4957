"""The Python blocks of Markdown pages, run as a reader would run them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.support import ROOT
from tests.support.snippet_runner import OURS

RUNNER = ROOT / "tests/support/snippet_runner.py"


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


@cache
def _forks() -> subprocess.Popen[str]:
    """What runs blocks alone; it ends with this process, whose pipe it reads."""
    command = [sys.executable, "-P", str(RUNNER), "alone"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(""), cwd="/"
    )


def _environment(path: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}


def run(snippets: Sequence[tuple[str, Path]]) -> None:
    """Run blocks, each in its folder; those that import nothing of ours in a process that refuses to import it.

    Raises:
        AssertionError: One fails; the message holds it.
    """
    alone, ours = ([(code, str(folder)) for code, folder in snippets if needs_us(code) == us] for us in (False, True))
    if alone:
        forks = _forks()
        assert forks.stdin is not None
        assert forks.stdout is not None
        with tempfile.NamedTemporaryFile("r") as told:
            print(json.dumps([told.name, alone]), file=forks.stdin, flush=True)
            ended = forks.stdout.readline()
            assert ended == "0\n", f"ended with {ended}{told.read()}"
    if ours:
        done = subprocess.run(
            [sys.executable, "-P", str(RUNNER), "ours"], input=json.dumps(ours), text=True, capture_output=True,
            env=_environment(str(ROOT)), check=False, cwd=ours[0][1],
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
