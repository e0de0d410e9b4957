"""One run at a time in an output folder.

The lock is a small file created only if it is not there; its holder renews it every few seconds. A lock is stale when
its process is gone (same machine, same boot), or, seen from another machine, when it has not been renewed for two
minutes. A stale lock is taken over. A holder that finds another's token in the lock has lost it and stops.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.input.files import OWN
from pipeline.storage import Folder

NAME = f"{OWN}/lock.json"
RENEW_S = 10.0
STALE_S = 120.0
SETTLE_S = 1.0


class OutputLocked(RuntimeError):
    """Another run holds the output folder; the message says which."""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; empty if there is no such process (or no /proc to ask)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def holder(folder: Folder) -> dict[str, Any] | None:
    """Who holds the lock: ``host``, ``pid``, ``silent_s``, ``stale``; None if nobody does."""
    try:
        content = json.loads(folder.read(NAME))
    except FileNotFoundError:
        return None
    except ValueError:
        return {"host": "unknown", "pid": 0, "token": "", "silent_s": STALE_S, "stale": True}
    silent = max(0.0, time.time() - content["renewed"])
    here = content["host"] == socket.gethostname() and content["boot"] == _boot() and bool(content["boot"])
    stale = _started(content["pid"]) != content["process"] if here else silent > STALE_S
    return {**content, "silent_s": silent, "stale": stale}


class Lock:
    """Held from construction to `release`.

    Raises:
        OutputLocked: Another run holds the folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder, self._token = folder, uuid4().hex
        self._stop, self.lost = threading.Event(), False
        self._acquire()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="latentmill-lock")
        self._thread.start()

    def _content(self) -> bytes:
        mine: Mapping[str, Any] = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "process": _started(os.getpid()),
            "token": self._token,
            "renewed": time.time(),
        }
        return json.dumps(mine).encode()

    def _acquire(self) -> None:
        if self._folder.create(NAME, self._content()):
            return
        other = holder(self._folder)
        if other is not None and not other["stale"]:
            raise OutputLocked(
                f"{self._folder.url}: another run holds this folder (process {other['pid']} on {other['host']}, last "
                f"sign of life {other['silent_s']:.0f} s ago); wait for it, stop it, or name another output folder"
            )
        with self._takeover():
            other = holder(self._folder)
            if other is not None and other["stale"]:
                self._folder.remove(NAME)
            taken = self._folder.create(NAME, self._content())
        if not self._folder.local:
            time.sleep(SETTLE_S)  # a store may let two remove and create; the later one's token stands
        if not taken or not self._mine():
            raise OutputLocked(f"{self._folder.url}: another run has just taken this folder; try again")

    @contextmanager
    def _takeover(self) -> Iterator[None]:
        """On a local disk one process at a time may replace a stale lock; the kernel lets go if it dies."""
        if not self._folder.local:
            yield
            return
        with open(self._folder.path(f"{NAME}.takeover"), "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            yield

    def _mine(self) -> bool:
        try:
            return bool(json.loads(self._folder.read(NAME))["token"] == self._token)
        except (FileNotFoundError, ValueError):
            return False

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not self._mine():
                    self.lost = True
                    return
                self._folder.write(NAME, self._content())
            except OSError:
                continue  # the store is away or the disk is full: the next turn tries again

    def release(self) -> None:
        self._stop.set()
        self._thread.join(timeout=RENEW_S)
        if not self.lost and self._mine():
            self._folder.remove(NAME)
