"""A run on a terminal of its own: one live line, `status` beside it, Ctrl-C, and going on afterwards."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.errors import terminable
from pipeline.output.dataset import Output
from pipeline.output.verify import verify
from tests.support import ROOT

COMMAND = [sys.executable, "-m", "tests.support.slow_cli"]
OURS = re.compile(
    r"[█▒·]{20}  |(planning|starting|running|finishing|publishing|complete|interrupted|failed)\b|waiting for workers: "
    r"|a worker (died|was lost)|report: |step \d+ of \d+: |stopped by Ctrl-C|\d+ x |\^C"
)
"""How a line begins that a run may show."""


def strangers(text: str) -> list[str]:
    """Lines that are not ours: of Ray, of a library, of Python's warnings."""
    shown = text.partition("Stopped. To go on")[0]
    return [line for line in re.split(r"[\r\n]+", shown) if line.strip() and not OURS.match(line.strip())]


class Terminal:
    """A command on a pseudo-terminal: what it has shown so far, keys, how it ended."""

    def __init__(self, arguments: list[str]) -> None:
        self.raw, self.pid, self.code = b"", 0, 0
        self.pid, self._handle = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm-256color", COLUMNS="120")
            os.execv(sys.executable, [*COMMAND, *arguments])

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))

    def _read(self, seconds: float) -> bool:
        if select.select([self._handle], [], [], seconds)[0]:
            with suppress(OSError):  # how Linux says that the other side is gone
                data = os.read(self._handle, 65536)
                self.raw += data
                return bool(data)
            return False
        return True

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert self._read(0.2), f"ended without {pattern!r}: {self.text[-2000:]}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {seconds} s: {self.text[-2000:]}"

    def press_ctrl_c(self) -> None:
        os.write(self._handle, b"\x03")

    def end(self) -> int:
        """Read to the end: the exit code, negative for a signal."""
        while self._read(60):
            pass
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._handle)
        self.pid = 0
        return self.code


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    started = Terminal(list(arguments))
    try:
        yield started
    finally:
        if started.pid:
            os.kill(started.pid, signal.SIGKILL)
            os.waitpid(started.pid, 0)


@pytest.fixture
def job(tmp_path: Path) -> tuple[str, str]:
    """A job file of 40 rows in 8 shards, four seconds on one worker; and where it goes."""
    (tmp_path / "rows.txt").write_text("".join(f"row {n}\n" for n in range(40)))
    path = tmp_path / "slow.yaml"
    text = f"job: slow\ninput: {tmp_path / 'rows.txt'}\npause: 0.1\nshard_rows: 5\nresources: {{cpus: 0.5}}\n"
    path.write_text(text)
    return str(path), str(tmp_path / "out")


def latentmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_live_line_status_ctrl_c_and_going_on(job: tuple[str, str], local_ray: str) -> None:
    path, out = job
    with terminal("run-job", path, "-o", out) as shown:
        shown.wait_for(r"[1-4]/8 shards")
        beside = latentmill("status", out, "--json")
        told = json.loads(beside.stdout)
        assert (told["state"], told["holder"]["pid"]) == ("running", shown.pid)
        assert told["progress"]["shards_done"] >= 1
        shown.press_ctrl_c()
        assert shown.end() == 130, shown.text
    live = shown.text
    assert re.search(r"[█▒]+·+  running +\d+%  \d+/40 rows", live)
    assert "█" not in live.rpartition("interrupted")[2]  # the line is gone, the result stays
    assert f"To go on: latentmill run-job {path} -o {out}" in live.replace("\r\n", "")
    assert "Traceback" not in live
    assert strangers(live) == []
    again = latentmill("run-job", path, "-o", out, "--address", local_ray, "--json")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert (result["state"], result["ok"]) == ("complete", 40)
    assert 1 <= result["resumed"] <= 8  # all, where a busy machine is slow to hear the key
    plain = again.stderr.splitlines()  # no terminal: a line for each phase, nothing drawn over
    assert plain[0].startswith("planning")
    assert len(plain) < 12
    assert "\r" not in again.stderr
    assert strangers(again.stderr) == []
    assert verify(out).ok


def test_strangers_are_known_by_their_lines() -> None:
    ray = "(raylet) A worker died or was killed while executing a task.\r\nrunning    5%  2/40 rows\r\n"
    assert strangers(ray) == ["(raylet) A worker died or was killed while executing a task."]
    assert strangers("2026-11-27 02:59:55,432\tINFO worker.py:1 -- Started a local Ray instance.") != []


def test_ctrl_c_while_ray_starts(job: tuple[str, str]) -> None:
    """Nothing is computed yet, and it still ends as it should."""
    path, out = job
    with terminal("run-job", path, "-o", out) as shown:
        shown.wait_for("starting")
        time.sleep(1.0)
        shown.press_ctrl_c()
        assert shown.end() == 130, shown.text
    assert "To go on: latentmill" in shown.text
    assert "Traceback" not in shown.text
    told = json.loads(latentmill("status", out, "--json").stdout)
    assert (told["state"], told["holder"]) == ("incomplete", None)


def test_sigterm_is_as_ctrl_c(job: tuple[str, str], local_ray: str) -> None:
    """Slurm, Kubernetes and systemd stop a job so; Ray's own way with it is an abort with a C++ stack."""
    path, out = job
    started = subprocess.Popen(
        [*COMMAND, "run-job", path, "-o", out, "--address", local_ray],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(Path(out).glob("_latentmill/records/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert "To go on: latentmill run-job" in said
    assert "Traceback" not in said
    assert "SIGTERM received" not in said
    told = Output.open(out).status()
    assert (told.state, told.holder) == ("incomplete", None)
    assert 1 <= told.progress.shards_done < 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_of_ray_is_not_torn_in_the_middle(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """A core worker that is interrupted while it connects crashes the process at its end (seen with Ray 2.60)."""
    import ray

    from pipeline.run.cluster import connected

    events: list[str] = []

    def init(**options: Any) -> None:
        events.append("begun")
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        events.append("started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: events.append("stopped"))
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)  # a suite in a shell's background ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt), terminable(), connected(None, 1):
            events.append("used")
        assert events == ["begun", "started", "stopped"]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
