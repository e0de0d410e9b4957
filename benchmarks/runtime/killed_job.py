"""A job that is killed once by SIGKILL and resumed: what `lego_scale` and `inversion_job` send through `run_job`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.output.dataset import Output
from pipeline.output.verify import verify


def run_killed_once(config: dict[str, Any], folder: Path, kill_at: int, every: float = 2.0) -> dict[str, Any]:
    """Run a job in a process group of its own, kill the group, run it again, verify the output.

    Args:
        config: The job.
        folder: Its output goes to ``folder/out``.
        kill_at: Committed shards at which the first run is killed.
        every: Seconds between two looks at shards and memory.

    Returns:
        Shards at the kill, rows, what `verify` says, seconds, and memory of the largest process over time.

    Raises:
        SystemExit: The second run did not complete.
    """
    out = str(folder / "out")
    code = f"from jobs.run import run_job; r = run_job({config!r}, output={out!r})"
    code += "; raise SystemExit(0 if r.state == 'complete' else f'{r.state}: {r.reason}')"
    memory: list[tuple[float, float]] = []
    began = time.perf_counter()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    def watch(process: subprocess.Popen[bytes], until: int | None) -> None:
        while process.poll() is None:
            memory.append((time.perf_counter() - began, largest(process.pid)))
            if until is not None and committed(out) >= until:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(every)

    watch(start(), kill_at)
    killed, killed_after = committed(out), time.perf_counter() - began
    second = start()
    watch(second, None)
    if second.returncode:
        raise SystemExit(f"the resumed job ended with {second.returncode}; see {out}")
    report = verify(out)
    again = [size for moment, size in memory if moment > killed_after]
    quarter = max(1, len(again) // 4)
    return {
        "shards_when_killed": killed,
        "verify_ok": report.ok,
        "rows_ok": report.rows_ok,
        "rows_failed": report.rows_failed,
        "seconds": time.perf_counter() - began,
        "largest_process_mb": {
            "peak": max(again, default=0.0),
            "second_quarter": sum(again[quarter : 2 * quarter]) / quarter,
            "last_quarter": sum(again[-quarter:]) / quarter,
        },
    }


def largest(pid: int) -> float:
    """Resident memory of the largest process of a family, in MB."""
    sizes = [0.0]
    for member in [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]:
        try:
            sizes.append(psutil.Process(member).memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            continue
    return max(sizes)


def committed(path: str) -> int:
    """Shards with a commit record."""
    try:
        return sum(1 for _ in Output.open(path).records())
    except (ValueError, OSError):
        return 0
