"""Situations from bug reports of neighbouring tools, each a script that makes its input, runs a job, and says PASS or
FAIL. They are no part of the repository: LATENTMILL_CASES names their folder (``.ci/run`` does, where it lies beside
the checkout). A dozen that need no network and no more than a few seconds each; the same kinds are held by tests beside
the modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDER = Path(os.environ.get("LATENTMILL_CASES") or "cases")
QUICK = (
    "02-captions-that-are-no-text", "05-first-file-all-null", "06-key-that-comes-late",
    "08-second-file-lacks-the-column", "11-csv-with-a-name-twice", "13-somebody-elses-status", "19-member-twice",
    "20-tar-cut-short", "25-names-with-an-underscore", "32-base64-pictures", "41-saved-twice", "52-tilde-in-a-model",
    "59-dry-run-of-an-impossible-job",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="LATENTMILL_CASES names no folder of cases")
@pytest.mark.parametrize("name", QUICK)
def test_a_case_passes(name: str) -> None:
    done = subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh")], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip().rpartition("\n")[2].startswith("PASS"), (done.stdout + done.stderr)[-2000:]
