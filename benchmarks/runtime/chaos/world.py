"""Where the jobs run: Ray nodes and a store of our own on this machine, and which of their processes are what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.weather import Google, Weather, gcs_server, s3_server, weather_before

STORES = ("disk", "s3", "gcs")
KEYS = {"key": "test", "secret": "test", "client_kwargs": {"region_name": "us-east-1"}}


@dataclass
class World:
    """What lies around the runs.

    Attributes:
        address: Of the Ray they work on.
        place: Folder or address below which outputs go.
        options: Of the store; empty for a disk.
        cluster: Ray's, where it is ours to take nodes from.
        proxy: Before the store; see `tests.support.weather`.
        stopped: Processes that stand still, to be woken whatever happens.
    """

    address: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    cluster: Any = None
    proxy: Any = None
    stopped: set[int] = field(default_factory=set)
    _second: Any = None

    def workers(self) -> list[psutil.Process]:
        """Processes of this world's Ray that hold a worker, or are building one."""
        return [member for member in _family() if _title(member).startswith("ray::_Actor")]

    def grow(self) -> None:
        """A second node, which can be taken away."""
        self._second = self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000)

    def lose_node(self) -> None:
        """Its raylet is killed, and its workers with it; then there is another."""
        processes = self._second.all_processes
        raylet = processes["raylet"][0].process
        workers = psutil.Process(raylet.pid).children(recursive=True)
        os.kill(raylet.pid, signal.SIGKILL)
        for member in workers:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        with suppress(Exception):  # Ray's own check that nothing is left
            self.cluster.remove_node(self._second, allow_graceful=False)
        self.grow()

    @contextmanager
    def standing_still(self, pid: int) -> Iterator[None]:
        """A process that is stopped meanwhile."""
        self.stopped.add(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            self.wake(pid)

    def wake(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        self.stopped.discard(pid)

    def start(self, job: Path, output: str, log: Path) -> subprocess.Popen[bytes]:
        """The command that a user types, in a process of its own; what it says is appended to ``log``."""
        command = [sys.executable, "-m", "jobs", "run-job", str(job), "--output", output, "--address", self.address]
        with log.open("ab") as said:
            return subprocess.Popen([*command, "--json"], stdout=said, stderr=said, start_new_session=True)


def _family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])
    return ""


class Sky(Weather):
    """Beside the storm: away for a while (503 to all), and slow."""

    def refusal(self, body: bytes) -> int | None:
        if getattr(self.server, "slow", 0):
            time.sleep(self.server.slow)
        return 503 if getattr(self.server, "away", False) else super().refusal(body)


class _GoogleSky(Sky, Google):
    """The same before Google's."""


@contextmanager
def store(kind: str, folder: Path) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(place, options, proxy) of an empty store."""
    if kind == "disk":
        yield str(folder / "out"), {}, None
    elif kind == "s3":
        with s3_server() as port, weather_before(port, Sky) as proxy:
            yield "s3://bucket", {**KEYS, "endpoint_url": f"http://127.0.0.1:{proxy.server_port}"}, proxy
    else:
        with gcs_server() as port, weather_before(port, _GoogleSky) as proxy:
            address = f"http://127.0.0.1:{proxy.server_port}"
            yield "gs://bucket", {"token": "anon", "project": "test", "endpoint_url": address}, proxy


@contextmanager
def nodes() -> Iterator[Any]:
    """Two Ray nodes of one processor each."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])  # workers import these sources, installed or not
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        with suppress(Exception):
            cluster.shutdown()


@contextmanager
def whole(kind: str, folder: Path) -> Iterator[World]:
    """Nodes and a store."""
    with store(kind, folder) as (place, options, proxy), nodes() as cluster:
        world = World(cluster.address, place, options, cluster, proxy)
        world.grow()
        try:
            yield world
        finally:
            for pid in list(world.stopped):
                world.wake(pid)


def after(seconds: float, action: Any) -> threading.Timer:
    """An action in a while, in a thread of its own."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer
