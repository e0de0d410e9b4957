"""Situations from bug reports of neighbouring tools, each a script that makes its input, runs a job, and says PASS or
FAIL. They are no part of the repository: LATENTMILL_CASES names their folder (``.ci/run`` does, where it lies beside
the checkout). None needs a network; the same kinds are held by tests beside the modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDER = os.environ.get("LATENTMILL_CASES")
CASES = sorted(Path(FOLDER).glob("*.sh")) if FOLDER else []
PATIENCE = """
import os, subprocess

os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(":")[2]  # what the script starts is left as it is
run = subprocess.run
subprocess.run = lambda *args, timeout=None, **rest: run(*args, timeout=timeout and 10 * timeout, **rest)
"""
"""The scripts give a job a minute. That is for whoever sits before them: a test says nothing of a busy machine."""


@pytest.mark.slow
@pytest.mark.skipif(not CASES, reason="LATENTMILL_CASES names no folder of cases")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_case_passes(case: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PATIENCE)
    patient = tmp_path / "python"
    patient.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    patient.chmod(0o755)
    done = subprocess.run(
        ["bash", str(case)], cwd=ROOT, env={**os.environ, "PYTHON": str(patient)}, capture_output=True, text=True
    )
    assert done.stdout.strip().rpartition("\n")[2].startswith("PASS"), (done.stdout + done.stderr)[-2000:]
