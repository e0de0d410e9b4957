"""The way to Ray: a connection to a cluster or to one of our own, and tasks that run there."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline import machine
from pipeline.run.tasks import Resources

T = TypeVar("T")
R = TypeVar("R")
OBJECT_STORE_BYTES = 200 * 2**20
"""Of a Ray that we start: nothing but descriptors and records passes through it."""

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30), "MALLOC_TOP_PAD_": str(2**28)}
"""glibc keeps freed memory instead of handing it back to the kernel. On a CPU a network's activations are megabytes
that come and go in every layer; fetching them anew each time costs page faults (docs/runtime.md has the figures)."""

PACKAGES = ("index", "jobs", "micro", "pipeline", "stages")
"""What workers import of ours."""

RAY_CLIENT_PORT = 10001
KNOCK_S = 10.0
STORE_SHARE = 0.4
"""Of the cluster's object store, that items which are spread over it may take."""


class ClusterError(RuntimeError):
    """There is no Ray to work on; the message says what was tried."""


def _allocator() -> dict[str, str]:
    """`ALLOCATOR`, but for what the user has set."""
    return {name: os.environ.get(name, value) for name, value in ALLOCATOR.items()}


def _import_paths() -> str:
    """Where this process imports from, for the workers of a Ray that we start: tests and notebooks work uninstalled.
    Folders that hold something of our packages' names are left out, but for ours.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(machine.__file__)))
    own = [path or os.getcwd() for path in sys.path]
    return os.pathsep.join(
        path for path in own
        if os.path.isdir(path) and "site-packages" not in path and (os.path.samefile(path, home) or not _shadows(path))
    )  # fmt: skip


def _shadows(path: str) -> bool:
    """Whether a folder holds what Python would take for one of our packages."""
    return any(os.path.exists(os.path.join(path, one)) for name in PACKAGES for one in (name, f"{name}.py"))


def _importer() -> Callable[[], None]:
    """What Ray runs first of all in a worker process. Later it puts the driver's working directory first on the path: a
    folder ``pipeline`` or a file ``index.py`` there must not be taken for ours, which have such plain names.
    """
    names = PACKAGES

    def import_packages() -> None:  # in here it travels by value: a worker without latentmill says so by its actor
        import importlib

        for name in names:
            with suppress(ImportError):
                importlib.import_module(name)

    return import_packages


@contextmanager
def _held_interrupt() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until Ray has started or stopped: caught halfway it crashes the process. Twice insists.

    What they did before they do afterwards: Ray's own way with SIGTERM ends in an abort. Where they kept Ray from
    starting (its processes got them too), or Ray's handler took one meanwhile and left, that is an interruption too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (Exception, SystemExit) as error:
        if pressed or getattr(error, "code", None) == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pressed:
        signal.raise_signal(pressed[0])


_ours: list[bool] = []
"""Not empty while this process is connected to a Ray that it started itself: one that never grows."""


def knock(address: str | None) -> None:
    """See whether there is anybody at the address of a Ray, which itself tries for minutes.

    Raises:
        ClusterError: There is nobody.
    """
    if address is None:
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = place.port or (RAY_CLIENT_PORT if place.scheme == "ray" else None)
        if place.hostname and port:
            socket.create_connection((place.hostname, port), timeout=KNOCK_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer in time"
        raise ClusterError(
            f"no Ray answers at {address!r} ({reason}): correct --address, start one there with `ray start --head`, or "
            "leave it out to work on this machine"
        ) from None


@contextmanager
def connected(address: str | None, cpus: float) -> Iterator[bool]:
    """A connection to Ray: the one at ``address``, the one this process has, or one that starts and stops here.

    Yields:
        Whether it was started by this process, and so holds what this machine has, and never more.

    Raises:
        ClusterError
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers run at the priority that the user started us with
    import ray

    if ray.is_initialized():
        yield bool(_ours)
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None or not address.startswith("ray://"):  # whose workers don't get our working directory
        options["runtime_env"] = {"worker_process_setup_hook": _importer()}
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, int(cpus) + 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        options["runtime_env"] |= {"env_vars": {"PYTHONPATH": _import_paths()} | _allocator()}
    else:
        knock(address)
        options["address"] = address
    try:
        _start(options)
        if address is None:
            _ours.append(True)
        yield address is None
    finally:
        _ours.clear()
        with _held_interrupt():
            ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """``ray.init``; a Ray of our own that came up too late is started a second time.

    A raylet ends itself where one of its helpers has not answered in 15 s, which no setting changes (ray 65983): Python
    reads their libraries from a cold disk, or compiles them. The second time they lie in memory.

    Raises:
        ClusterError: It did not come up, or does not let us in.
    """
    import ray

    local = options["address"] == "local"
    for attempt in (1, 2):
        try:
            with _held_interrupt():
                ray.init(**options)
            return
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if local and "timed out" in reason and attempt == 1:
                ray.shutdown()
                continue
            where = "a local Ray could not be started" if local else f"no Ray lets us in at {options['address']!r}"
            advice = "" if local else "; if it asks for a token (Ray 2.60's default), set RAY_AUTH_MODE=token"
            raise ClusterError(f"{where}: {reason}{advice}") from None


def spread(function: Callable[..., R], items: Iterable[T], *shared: Any, size: int = 0) -> Iterator[R]:
    """A function of each item, computed by tasks on the cluster, a few ahead of what is asked for; in order.

    Args:
        function: Called with an item and what is shared.
        shared: Goes to each machine once.
        size: Bytes of an item and its answer, where they are many: the cluster's object store holds all that is ahead.

    Raises:
        SourceError, OSError: The function did.
        ClusterError: Its process died, three times more after it was started anew.
    """
    import ray

    remote: Any = ray.remote
    told = remote(num_cpus=1, max_retries=3)(_told).remote
    total = ray.cluster_resources()
    ahead = 2 * max(1, int(total.get("CPU", 1)))
    if size:
        ahead = max(2, min(ahead, int(STORE_SHARE * total.get("object_store_memory", 0)) // size))
    kept = [ray.put(one) for one in shared]
    running: deque[tuple[str, Any]] = deque()
    coming = iter(items)
    while True:
        for item in islice(coming, ahead - len(running)):
            running.append((str(item), told(function, item, *kept)))
        if not running:
            return
        name, answer = running.popleft()
        try:
            found, error = ray.get(answer)
        except ray.exceptions.RayError as lost:
            raise ClusterError(f"{name}: its task cannot be done ({first_line(lost)})") from None
        if error is not None:
            raise error
        yield found


def elsewhere(function: Callable[[], R], resources: Resources) -> R:
    """What a function returns that runs once on the cluster, with what a worker gets. Ctrl-C ends it there too.

    Raises:
        ValueError, OSError, RuntimeError: The function did.
        ClusterError: Its process died, and did so again each of the three times it was started anew.
    """
    import ray

    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 3}
    if resources.memory is not None:
        options["memory"] = resources.memory
    remote: Any = ray.remote
    answer = remote(**options)(_told).remote(function)
    try:
        found, error = ray.get(answer)
    except KeyboardInterrupt:
        ray.cancel(answer, force=True)
        raise
    except ray.exceptions.RayError as lost:
        raise ClusterError(f"its process on the cluster died ({first_line(lost)}); run the job again") from None
    if error is not None:
        raise error
    return found


def _told(function: Callable[..., R], *arguments: Any) -> tuple[R | None, Exception | None]:
    """Runs in a worker process: what is wrong with input, storage or settings is an answer."""
    try:
        return function(*arguments), None
    except (ValueError, OSError, RuntimeError) as error:
        return None, error


def resources_of(address: str) -> dict[str, float]:
    """What the Ray at an address has in all: CPU, GPU, memory (bytes), ``node:...`` for each machine.

    Raises:
        ClusterError: Nobody is there, or it does not let us in.
    """
    import ray

    with connected(address, 1):
        return dict(ray.cluster_resources())


def first_line(error: BaseException) -> str:
    """What went wrong, of all that Ray says: the last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
