"""The only module that knows Ray: a pool of actors, each with one `Worker`, and what becomes of them.

Plain actors, not Ray Data: a block that always kills its actor is retried for ever there, and who died on which rows
is exactly what a run has to know. Descriptors go out, records come back; no row passes through the driver.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline import machine
from pipeline.contract import halvings
from pipeline.failures import Fault, described, fault_of, passing
from pipeline.run.pulse import Heart, Pulse
from pipeline.run.tasks import Outcome, Resources, Task, WorkerJob

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
MOST_TASKS = 16
"""Shards that one worker may have in hand, where its stage holds the rows of more than one."""
DEAF_S, QUIET_S = 900.0, 1800.0
"""How long a worker's process may leave the driver without an answer (it was stopped, or its machine hangs), and may
answer without a sign of life (`pipeline.run.pulse`), before another takes its place."""
STORE_SHARE = 0.4
"""Of the cluster's object store, that items which are spread over it may take."""
LONGEST_TURN_S = 5.0
"""More than that between two questions was the driver's own pause."""


class ClusterError(RuntimeError):
    """There is no Ray to work on; the message says what was tried."""


class _Actor:
    """Runs in a worker process. It never raises: what went wrong is an answer."""

    def __init__(self, job: WorkerJob) -> None:
        self.problem: str | None = None
        try:
            from pipeline import access
            from pipeline.run.worker import Worker

            access.hold(job.granted)
            self.worker = Worker(job)
            # What is loaded by now stays: else the collector walks through all of it again for every few rows.
            gc.collect()
            gc.freeze()
            self.heart = Heart(lambda: (self.worker.done, self.worker.read))
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def ready(self) -> tuple[str | None, str, int]:
        """Why there is no worker (None: there is one), the node that it is on, and how many rows its stage holds."""
        import ray

        holds = 0 if self.problem else self.worker.holds
        return self.problem, ray.get_runtime_context().get_node_id(), holds

    def process(self, task: Task) -> Outcome:
        self.heart.begin()
        try:
            outcome = Outcome("done", self.worker.process(task))
        except Exception as error:
            outcome = Outcome(fault_of(error), reason=described(error), away=passing(error))
        return replace(outcome, halvings=halvings.taken(), fits=self.worker.learned())

    def calibrate(self, task: Task) -> tuple[float, int, float, int, int]:
        """(seconds to build the stage, rows, seconds, bytes, failed)."""
        return (self.worker.build_seconds, *self.worker.calibrate(task))

    def pulse(self) -> Pulse:
        return self.heart.pulse()


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
        from contextlib import suppress

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
            raise ClusterError(f"{name}: its task cannot be done ({_first_line(lost)})") from None
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
        raise ClusterError(f"its process on the cluster died ({_first_line(lost)}); run the job again") from None
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


class _Member:
    """One worker of the pool, as the driver sees it."""

    def __init__(self, actor: Any, created: float) -> None:
        self.actor, self.created = actor, created
        self.starting: Any = actor.ready.remote()
        self.tasks: dict[Any, Task] = {}
        """What it is at work on, by the answer that is awaited; the oldest first."""
        self.asked: Any = None
        self.deaf = 0.0
        self.waits = ""
        self.active = 0
        self.node = ""
        self.holds = 0

    @property
    def hungry(self) -> bool:
        """Whether another task beside those that it has would keep its stage full: the oldest may be near its end."""
        tasks = list(self.tasks.values())
        if not tasks or len(tasks) >= MOST_TASKS or any(task.alone for task in tasks):
            return False
        return sum(task.stop - task.start for task in tasks[1:]) < self.holds


class Pool:
    """Workers that build the stage once and then take tasks. Not thread-safe; used from the driver's thread.

    Attributes:
        build_failures: Workers in a row that could not build their stage; `build_problem` says why.
        lost: What happened to workers since it was last read.
        deaths: Workers that died at work.
    """

    def __init__(self, job: WorkerJob, resources: Resources) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_restarts": 0}
        if resources.memory is not None:
            options["memory"] = resources.memory
        groups = {"watch": 1, "work": MOST_TASKS}
        self._ray = ray
        remote: Any = ray.remote
        self._make = remote(concurrency_groups=groups, **options)(_Actor).remote
        self._job = ray.put(job)
        self._resources = resources
        self._members: list[_Member] = []
        self.build_failures, self.build_problem = 0, ""
        self.lost: list[str] = []
        self.deaths = 0
        self._stuck: list[tuple[Task, Outcome]] = []
        self._heard = machine.here.clock()

    def lacking(self) -> str:
        """What of a worker's resources all of the cluster does not have: ``1 GPU (of 0)``; empty if nothing."""
        total = self._ray.cluster_resources()
        asked = (("CPU", self._resources.cpus), ("GPU", self._resources.gpus))
        short = [
            f"{amount:g} {name} (of {total.get(name, 0):g})" for name, amount in asked if amount > total.get(name, 0)
        ]
        memory, there = self._resources.memory or 0, total.get("memory", 0)
        if memory > there:
            short.append(f"{memory / 2**30:,.1f} GiB of memory (of {there / 2**30:,.1f})")
        return " and ".join(short)

    def room(self) -> int:
        """How many workers there may be: what was asked for, else what fits at present."""
        return self.fits() if self._resources.max_workers is None else max(1, self._resources.max_workers)

    def fits(self) -> int:
        """How many workers the cluster holds at present, at least one."""
        total = self._ray.cluster_resources()
        asked = {"CPU": self._resources.cpus, "GPU": self._resources.gpus, "memory": self._resources.memory or 0}
        held = [int(total.get(name, 0) / amount) for name, amount in asked.items() if amount]
        return max(1, min(held, default=1))

    def grow(self, size: int) -> None:
        """Start workers until there are ``size`` of them, ready or not."""
        while len(self._members) < size:
            self._members.append(_Member(self._make(self._job), machine.here.clock()))

    @property
    def size(self) -> int:
        return len(self._members)

    @property
    def ready(self) -> int:
        return sum(member.starting is None for member in self._members)

    @property
    def busy(self) -> int:
        return sum(bool(member.tasks) for member in self._members)

    @property
    def idle(self) -> int:
        return self.ready - self.busy

    @property
    def hungry(self) -> bool:
        """Whether a worker would take another task beside those that it has."""
        return any(member.hungry for member in self._members)

    @property
    def active_rows(self) -> int:
        """Rows through the stage in tasks that are not finished, as last heard."""
        return sum(member.active for member in self._members if member.tasks)

    def available(self) -> str:
        """What the cluster has, for a message."""
        total = self._ray.cluster_resources()
        return ", ".join(f"{total.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    def give(self, task: Task) -> None:
        """Hand a task to an idle worker, of a node that it does not avoid if there is one; else to a hungry one."""
        idle = [member for member in self._members if member.starting is None and not member.tasks]
        taking = idle or [member for member in self._members if member.hungry]
        member = min(taking, key=lambda member: (member.node in task.avoid, len(member.tasks)))
        running = member.actor.process.options(concurrency_group="work").remote(task)
        member.tasks[running] = task

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """Tasks that have ended, one way or another; returns at once when there is one, else after ``seconds``."""
        if self._stuck:
            stuck, self._stuck = self._stuck, []
            return stuck
        starting = [member.starting for member in self._members if member.starting is not None]
        waiting = [*starting, *(running for member in self._members for running in member.tasks)]
        if not waiting:
            machine.here.sleep(seconds)
            return []
        self._ray.wait(waiting, num_returns=1, timeout=seconds)
        ready = set(self._ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        ended: list[tuple[Task, Outcome]] = []
        for member in list(self._members):
            if member.starting in ready and member.starting is not None:
                self._started(member)
            found = [self._ended(member, running) for running in list(member.tasks) if running in ready]
            ended += found
            lost = [outcome for _, outcome in found if outcome.kind in (Fault.POISON, Fault.PREEMPTED)]
            if lost:
                self.deaths += 1
                self._lose(member, lost[0])
        return ended

    def ask(self) -> None:
        """Hear from busy workers how far they are, without waiting for it. Who shows no sign of life is replaced."""
        now = machine.here.clock()
        passed, self._heard = min(now - self._heard, LONGEST_TURN_S), now
        for member in list(self._members):
            if not member.tasks or member.starting is not None:
                continue
            quiet = 0.0
            if member.asked is None:
                member.asked, member.deaf = member.actor.pulse.options(concurrency_group="watch").remote(), 0.0
            elif self._ray.wait([member.asked], timeout=0)[0]:
                with suppress(Exception):  # a worker that died is noticed by its task
                    told = self._ray.get(member.asked)
                    member.active, quiet = told.done, told.quiet_s
                    if told.waits and not member.waits:
                        self.lost.append(f"a worker waits: {told.waits}")
                    member.waits = told.waits
                member.asked = None
            else:
                member.deaf += passed
            if member.deaf > DEAF_S:
                self._give_up(member, f"its process has not answered for {member.deaf:.0f} s")
            elif quiet > QUIET_S:
                self._give_up(member, f"it has read no row, done none and computed nothing for {quiet:.0f} s")

    def _give_up(self, member: _Member, reason: str) -> None:
        """End a worker that is stuck; its tasks end as if it had died."""
        self.deaths += 1
        self._lose(member, Outcome(Fault.POISON, None, reason, node=member.node, nodes=self._nodes()))

    def _lose(self, member: _Member, outcome: Outcome) -> None:
        """A worker is no more, and what it had in hand ends with it."""
        self._stuck += [(task, outcome) for task in member.tasks.values()]
        member.tasks.clear()
        self._drop(member)

    def _started(self, member: _Member) -> None:
        try:
            problem, member.node, member.holds = self._ray.get(member.starting)
        except Exception as error:
            fault, _, reason = self._end(error, member.node)
            if fault is Fault.PREEMPTED:
                self.lost.append(f"a worker was lost while it started ({reason})")
                self._drop(member)
                return
            problem = f"the worker died while it started ({reason})"
        member.starting = None
        if problem is None:
            self.build_failures = 0
            return
        self.build_failures, self.build_problem = self.build_failures + 1, problem
        self.lost.append(f"a worker could not build the stage: {problem}")
        self._drop(member)

    def _ended(self, member: _Member, running: Any) -> tuple[Task, Outcome]:
        task = member.tasks.pop(running)
        member.asked, member.active = None, max(0, member.active - (task.stop - task.start))
        try:
            outcome: Outcome = self._ray.get(running)
        except Exception as error:
            outcome = Outcome(*self._end(error, member.node))
        if outcome.kind in (Fault.POISON, Fault.PREEMPTED):
            outcome = replace(outcome, node=member.node, nodes=self._nodes())
        return task, outcome

    def _end(self, error: Exception, node: str) -> tuple[Fault, None, str]:
        """Whose fault the end of a worker is, as Ray tells it, and in what words.

        A worker that died of itself, on a node that lives, says nothing more than that: a signal, the kernel that wants
        its memory, a fault in native code all look the same from outside.
        """
        ray, said = self._ray.exceptions, str(error)
        if isinstance(error, ray.OutOfMemoryError):
            return Fault.POISON, None, "Ray ended the worker because its node had no memory left"
        if isinstance(error, ray.ActorUnavailableError):
            return Fault.PREEMPTED, None, "its node cannot be reached"
        if not isinstance(error, ray.RayActorError):
            return (Fault.PREEMPTED if isinstance(error, ray.RayError) else Fault.POISON), None, _first_line(error)
        if error.preempted:
            return Fault.PREEMPTED, None, "its node was taken away"
        if "node has died" in said or (node and node not in self._nodes(0)):
            return Fault.PREEMPTED, None, "its node is gone"
        if "INTENDED" in said or "killed by `ray.kill`" in said:
            return Fault.PREEMPTED, None, "it was told to stop from outside"
        return Fault.POISON, None, "the worker process died"

    def _nodes(self, share: float = 1) -> frozenset[str]:
        """Living nodes that are large enough for a worker.

        Args:
            share: Of a worker; 0: all that live.
        """
        asked = {"CPU": self._resources.cpus, "GPU": self._resources.gpus, "memory": self._resources.memory or 0}
        living = [node for node in self._ray.nodes() if node["Alive"]]
        return frozenset(
            node["NodeID"] for node in living
            if all(node["Resources"].get(name, 0) >= share * amount for name, amount in asked.items())
        )  # fmt: skip

    def _drop(self, member: _Member) -> None:
        self._members.remove(member)
        with suppress(Exception):
            self._ray.kill(member.actor, no_restart=True)

    def close(self) -> None:
        for member in list(self._members):
            self._drop(member)

    def calibrate(self, task: Task) -> tuple[float, int, float, int, int]:
        """Time a task on one worker.

        Raises:
            ClusterError: The stage cannot be built, or its worker died.
        """
        self.grow(1)
        member = self._members[0]
        try:
            problem, _, _ = self._ray.get(member.starting)
            if problem is None:
                measured: tuple[float, int, float, int, int] = self._ray.get(member.actor.calibrate.remote(task))
                return measured
        except Exception as error:
            problem = _first_line(error)
        raise ClusterError(f"the sample could not be timed: {problem}")


def label(path: str) -> str:
    """A path as the value of a Prometheus label: Ray takes ASCII alone, and says so by ending the run."""
    return path.encode("ascii", errors="backslashreplace").decode()


COUNTERS = {
    "rows": ("Rows in committed shards", "status"),
    "shards": ("Committed shards", None),
    "task_failures": ("Tasks that ended without a result, by whose fault it was", "fault"),
    "retries": ("Tasks that were handed out again, whole or in halves", None),
    "out_of_memory": ("Times that work ran out of memory and went on with half as much at once", None),
    "worker_deaths": ("Workers that died", None),
}
"""What is counted, and by which further label; Prometheus sees ``ray_latentmill_<name>_total``."""
GAUGES = {
    "workers": "Workers that are ready",
    "rows_planned": "Rows of the plan",
    "rows_done": "Rows in committed shards, those of earlier starts included",
}
"""What goes up and down: ``ray_latentmill_<name>``."""


class Meters:
    """Counts for Prometheus, through Ray's metrics agent. Each has the label ``output``."""

    def __init__(self, output: str, planned: int) -> None:
        from ray.util import metrics

        self._tags, self._deaths = {"output": label(output)}, 0
        self._counters = {
            name: metrics.Counter(f"latentmill_{name}", text, tag_keys=("output",) + ((by,) if by else ()))
            for name, (text, by) in COUNTERS.items()
        }
        self._gauges = {
            name: metrics.Gauge(f"latentmill_{name}", text, tag_keys=("output",)) for name, text in GAUGES.items()
        }
        self._gauges["rows_planned"].set(planned, self._tags)

    def _count(self, name: str, amount: int = 1, **by: str) -> None:
        if amount:
            self._counters[name].inc(amount, {**self._tags, **by})

    def committed(self, ok: int, failed: int, duplicates: int) -> None:
        for status, count in (("ok", ok), ("failed", failed), ("duplicate", duplicates)):
            self._count("rows", count, status=status)
        self._count("shards")

    def ended(self, outcome: Outcome) -> None:
        """A task has: with a result, or by somebody's fault."""
        self._count("out_of_memory", outcome.halvings)
        if outcome.kind != "done":
            self._count("task_failures", fault=str(outcome.kind))

    def retried(self, tasks: int = 1) -> None:
        self._count("retries", tasks)

    def turn(self, workers: int, deaths: int, done: int) -> None:
        """How it stands: workers that are ready, those that died so far, and rows in committed shards."""
        self._count("worker_deaths", deaths - self._deaths)
        self._deaths = deaths
        self._gauges["workers"].set(workers, self._tags)
        self._gauges["rows_done"].set(done, self._tags)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
