"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.output.lock import NAME, Lock, OutputLocked, holder
from pipeline.storage import Folder


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    script = f"""
import os, signal
from pipeline.output.lock import Lock
from pipeline.storage import Folder
Lock(Folder.at({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    left = holder(folder)
    assert left is not None
    assert left["stale"]
    lock = Lock(folder)
    with pytest.raises(OutputLocked, match=str(os.getpid())):
        Lock(folder)
    lock.release()
    assert holder(folder) is None


def test_lock_from_another_machine_counts_by_its_age(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    Lock(folder).release()
    content = {"host": "elsewhere", "boot": "b", "pid": 1, "process": "1", "token": "t", "renewed": 0}
    folder.write(NAME, json.dumps(content).encode())
    assert holder(folder)["stale"]  # type: ignore[index]
    folder.write(NAME, json.dumps({**content, "renewed": 1e12}).encode())
    with pytest.raises(OutputLocked, match="elsewhere"):
        Lock(folder)
