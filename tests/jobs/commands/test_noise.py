"""What is shown is ours: no line of Ray, of a library or of Python's warnings among the plans of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.runtime import noise
from benchmarks.runtime.chaos import jobs
from tests.support import ROOT

ONE_AFTER_ANOTHER = """
import sys
from jobs.commands.cli import app
for job in sys.argv[1:]:
    print("plan of", job, flush=True)
    app(["run-job", job, "--output", "out", "--dry-run"], standalone_mode=False)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plans_of_every_kind_show_no_line_of_a_library(tmp_path: Path) -> None:
    """All in one process, at the descriptors: what a library prints when it is loaded, and what it warns of."""
    kinds = [kind for kind in jobs.KINDS if kind not in jobs.NEEDS]  # the others read what was run before
    files = [str(jobs.write(kind, tmp_path, 1, {})) for kind in kinds]
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", ONE_AFTER_ANOTHER, *files], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("plan of") == len(kinds)
    assert done.stdout.count(" rows ") >= len(kinds)
    assert done.stderr == ""
    assert noise.strangers(["run-job", "--dry-run"], done.stdout.replace(str(tmp_path), "")) == []


def test_a_library_s_line_is_known() -> None:
    run = ["run-job", "job.yaml"]
    for line in (
        "2026-11-27 02:59:55,432\tINFO worker.py:1 -- Started a local Ray instance.",
        "(raylet) A worker died or was killed while executing a task.",
        "Loading checkpoint shards: 100%|####| 2/2 [00:00<00:00,  3.2it/s]",
        "/usr/lib/python3.11/site-packages/x.py:1: UserWarning: so it is",
        "some words that nobody of us says",
    ):
        assert noise.strangers(run, f"planning ...\n{line}\nreport: out/report.html\n") == [line]
    assert noise.strangers(run, "running   20%  2/10 rows\ncomplete  10 rows: 8 ok, 2 failed\n") == []
