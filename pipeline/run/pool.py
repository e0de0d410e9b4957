"""A pool of actors on Ray, each with one `Worker`, and what becomes of them.

Plain actors, not Ray Data: a block that always kills its actor is retried for ever there, and who died on which rows
is exactly what a run has to know. Descriptors go out, records come back; no row passes through the driver.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline import machine
from pipeline.contract import halvings
from pipeline.failures import Fault, described, fault_of, passing
from pipeline.run.cluster import ClusterError, first_line
from pipeline.run.pulse import Heart, Pulse
from pipeline.run.tasks import Outcome, Resources, Task, WorkerJob

MOST_TASKS = 16
"""Shards that one worker may have in hand, where its stage holds the rows of more than one."""
DEAF_S, QUIET_S = 900.0, 1800.0
"""How long a worker's process may leave the driver without an answer (it was stopped, or its machine hangs), and may
answer without a sign of life (`pipeline.run.pulse`), before another takes its place."""
LONGEST_TURN_S = 5.0
"""More than that between two questions was the driver's own pause."""


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
            return (Fault.PREEMPTED if isinstance(error, ray.RayError) else Fault.POISON), None, first_line(error)
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
            problem = first_line(error)
        raise ClusterError(f"the sample could not be timed: {problem}")
