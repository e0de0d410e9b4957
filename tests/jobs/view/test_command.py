"""``latentmill view`` itself: what it opens, and what it says where it cannot."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.view import named
from tests.support import ROOT

DONE = ROOT / "tests" / "pipeline" / "run" / "old_outputs" / "finished"


def test_steps_of_a_chain_and_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("chain/one", "elsewhere/one", "there/one"):
        shutil.copytree(DONE, tmp_path / place)
    steps = [{"name": name, "job": "toy", "output": name} for name in ("one", "not-begun")]
    (tmp_path / "chain" / "chain.json").write_text(json.dumps({"steps": steps}))
    found = named([str(tmp_path / place) for place in ("chain", "elsewhere/one", "there/one/", "there/one")])
    assert {name: Path(output.path) for name, output in found.items()} == {
        "one": tmp_path / "chain/one", "elsewhere/one": tmp_path / "elsewhere/one",
        "there/one": tmp_path / "there/one", "one (2)": tmp_path / "there/one",
    }  # fmt: skip


def test_what_cannot_be_shown_is_a_sentence(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["view", str(tmp_path)])
    assert (said.exit_code, "there is no run in this folder" in said.output) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = CliRunner().invoke(app, ["view", str(DONE), "--port", port])
    assert (said.exit_code, "another one: --port 0" in said.output) == (2, True)


def test_it_prints_its_address_answers_there_and_ends_when_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "view", str(DONE), "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heeding_ctrl_c
    ) as started:
        try:
            assert started.stdout is not None
            url = started.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
            with urllib.request.urlopen(f"{url}api/count?run=finished") as answer:
                assert json.loads(answer.read()) == {"rows": 20}
            started.send_signal(signal.SIGINT)
            _, errors = started.communicate(timeout=60)
        finally:
            started.kill()
    assert (started.returncode, errors) == (0, "")


def _heeding_ctrl_c() -> None:
    """A shell that starts the tests in the background has its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
