"""Who dies on which rows, and what that means for them: the dispatcher with workers that die as a test says."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import machine
from pipeline.failures import Fault
from pipeline.input.rows import Span
from pipeline.input.shards import Shard
from pipeline.output.commit import Record
from pipeline.output.dataset import Tally
from pipeline.run.deaths import LOSSES, ONE_NODE_DEATHS
from pipeline.run.dispatch import Dispatcher, Stopped
from pipeline.run.driver import RunError, run
from pipeline.run.tasks import Outcome, Piece, Task
from tests.support.faulty import spec_for
from tests.support.forgetful import Forgetful

Fate = Callable[[Task, str, int], str]
"""A task, the node that it is on, how often it was given -> ``done``, ``died``, ``lost``, ``away``, ``full``."""


class Workers:
    """A pool with a worker on each node, one after the other at work. Lists what each task was given to."""

    build_failures, build_problem, active_rows, lost, hungry, deaths = 0, "", 0, (), False, 0

    def __init__(self, nodes: list[str], fate: Fate) -> None:
        self.nodes, self.fate = nodes, fate
        self.given: list[tuple[int, int, int, str]] = []
        self.condemned: dict[int, str] = {}
        self.lost: list[str] = []
        self.rounds = 0
        self._now: list[tuple[Task, str]] = []
        self.size = self.ready = len(nodes)

    def room(self) -> int:
        return len(self.nodes)

    @property
    def idle(self) -> int:
        return len(self.nodes) - len(self._now)

    def grow(self, size: int) -> None: ...

    def ask(self) -> None: ...

    def available(self) -> str:
        return ""

    def give(self, task: Task) -> None:
        free = [node for node in self.nodes if node not in [busy for _, busy in self._now]]
        self._now.append((task, min(free, key=lambda node: node in task.avoid)))

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        ended, self._now, self.rounds = self._now, [], self.rounds + 1
        return [(task, self._outcome(task, node)) for task, node in ended]

    def _outcome(self, task: Task, node: str) -> Outcome:
        key = (task.shard, task.start, task.stop)
        self.given.append((*key, node))
        if task.condemned:
            self.condemned[task.start] = task.condemned
        settled = task.condemned or task.pieces
        end = "done" if settled else self.fate(task, node, sum(g[:3] == key for g in self.given))
        if end in ("away", "full"):
            return Outcome(Fault.TRANSIENT, None, f"s3://bucket is {end}", end == "away")
        if end != "done":
            kind = Fault.POISON if end == "died" else Fault.PREEMPTED
            return Outcome(kind, None, "the end", node=node, nodes=frozenset(self.nodes))
        if not task.whole:
            return Outcome("done", Piece(task.start, task.stop, "", 0, "", task.stop - task.start, 0))
        return Outcome("done", Record(task.shard, "", "", 0, "", task.stop - task.start, 0, 0.0, 0.0, ""))


class Shared(Workers):
    """Several workers on one node."""

    def give(self, task: Task) -> None:
        self._now.append((task, self.nodes[0]))


class Joining(Workers):
    """A worker that takes several tasks: when one kills it, all end so."""

    @property
    def idle(self) -> int:
        return int(not self._now)

    @property
    def hungry(self) -> bool:  # type: ignore[override]
        return 0 < len(self._now) < 4 and not any(task.alone for task, _ in self._now)

    def give(self, task: Task) -> None:
        self._now.append((task, self.nodes[0]))

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        self.together.append([task.shard for task, _ in self._now])
        ended = super().wait(seconds)
        death = next((outcome for _, outcome in ended if outcome.kind is Fault.POISON), None)
        return [(task, death or outcome) for task, outcome in ended]

    together: list[list[int]]


class _Quiet:
    lost = False

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def _run(nodes: list[str], rows: int, fate: Fate, shards: int = 1, told: list[str] | None = None) -> Workers:
    workers, span = Workers(nodes, fate), Span("in.txt", "in.txt", 0, rows)
    todo = iter([Task.of(Shard(number, (span,))) for number in range(shards)])
    quiet: Any = _Quiet()
    quiet.running = lambda *args: told.append(args[4]) if told is not None and len(args) > 4 else None
    Dispatcher(workers, todo, Tally(), quiet, quiet, quiet, 1e9, shards, 1, quiet, Forgetful()).run()  # type: ignore[arg-type]
    return workers


def test_shards_that_were_in_hand_together_are_tried_alone() -> None:
    """A shard of one row kills every worker: it alone is blamed, and no other is halved or tried beside it again."""
    workers = Joining(["a"], lambda task, node, times: "died" if task.shard == 2 else "done")
    workers.together, span = [], Span("in.txt", "in.txt", 0, 1)
    todo = iter([Task.of(Shard(number, (span,))) for number in range(9)])
    quiet: Any = _Quiet()
    Dispatcher(workers, todo, Tally(), quiet, quiet, quiet, 1e9, 9, 1, quiet, Forgetful()).run()  # type: ignore[arg-type]
    assert workers.together[0] == [0, 1, 2, 3]
    assert [len(hand) for hand in workers.together if set(hand) & {0, 1, 2, 3}][1:] == [1] * 6
    assert sum(2 in hand for hand in workers.together) == 4  # together, twice alone, and to be written down
    assert "killed 2 workers" in workers.condemned[0]


def test_a_row_whose_nodes_are_taken_away_is_never_condemned() -> None:
    """Ten nodes go, one after the other, with the same slow row on them; it is done on the eleventh."""
    workers = _run(["a"], 1, lambda task, node, times: "lost" if times <= 10 else "done")
    assert workers.condemned == {}
    assert workers.given == [(0, 0, 1, "a")] * 11


def test_a_shard_whose_nodes_are_taken_away_is_not_halved() -> None:
    workers = _run(["a", "b"], 1000, lambda task, node, times: "lost" if times <= 5 else "done")
    assert {given[:3] for given in workers.given} == {(0, 0, 1000)}


def test_a_row_that_kills_is_condemned_after_two_nodes() -> None:
    workers = _run(["a", "b", "c"], 1, lambda task, node, times: "died")
    assert [given[3] for given in workers.given[:2]] == ["a", "b"]
    assert "killed 2 workers" in workers.condemned[0]
    assert len(workers.given) == 3  # and once to write it down


def test_a_row_that_dies_on_one_bad_node_lives_on_another() -> None:
    workers = _run(["bad", "good"], 1, lambda task, node, times: "died" if node == "bad" else "done")
    assert workers.condemned == {}
    assert [given[3] for given in workers.given] == ["bad", "good"]


def test_a_row_that_kills_on_the_only_node_is_condemned_there() -> None:
    workers = _run(["a"], 1, lambda task, node, times: "died")
    assert "killed 2 workers" in workers.condemned[0]


def test_rows_that_die_together_are_not_to_blame() -> None:
    """The kernel that needs memory kills all workers of a node at once, three times: nobody's row is poison."""
    workers = Shared(["a"] * 4, lambda task, node, times: "died" if workers.rounds <= 3 else "done")
    todo = iter([Task.of(Shard(number, (Span("in.txt", "in.txt", 0, 1),))) for number in range(4)])
    quiet: Any = _Quiet()
    Dispatcher(workers, todo, Tally(), quiet, quiet, quiet, 1e9, 4, 1, quiet, Forgetful()).run()  # type: ignore[arg-type]
    assert workers.condemned == {}


def test_several_rows_that_kill_are_all_found_on_one_node() -> None:
    poison = {3, 4, 250, 251, 700}

    def fate(task: Task, node: str, times: int) -> str:
        return "died" if poison & set(range(task.start, task.stop)) else "done"

    shared = Shared(["a"] * 4, fate)
    todo = iter([Task.of(Shard(0, (Span("in.txt", "in.txt", 0, 1000),)))])
    quiet: Any = _Quiet()
    Dispatcher(shared, todo, Tally(), quiet, quiet, quiet, 1e9, 1, 1, quiet, Forgetful()).run()  # type: ignore[arg-type]
    assert set(shared.condemned) == poison
    assert len(shared.given) < 150


@pytest.mark.parametrize("poison", [0, 617, 999])
def test_the_row_that_kills_is_found_among_a_thousand(poison: int) -> None:
    def fate(task: Task, node: str, times: int) -> str:
        return "died" if task.start <= poison < task.stop else "done"

    workers = _run(["a", "b"], 1000, fate)
    assert list(workers.condemned) == [poison]
    assert len(workers.given) < 40


def test_a_strike_on_a_node_that_is_gone_since_does_not_count() -> None:
    """A machine that runs out of memory loses its workers first, and then itself."""
    nodes = ["a"]

    def fate(task: Task, node: str, times: int) -> str:
        if times >= 6:
            return "done"
        nodes[0] = f"node {times}"  # it has gone, and another came
        return "died"

    workers = Workers(nodes, fate)
    todo = iter([Task.of(Shard(0, (Span("in.txt", "in.txt", 0, 1),)))])
    quiet: Any = _Quiet()
    Dispatcher(workers, todo, Tally(), quiet, quiet, quiet, 1e9, 1, 1, quiet, Forgetful()).run()  # type: ignore[arg-type]
    assert workers.condemned == {}


class Clock(machine.Machine):
    """Half a second goes by each time that it is asked."""

    now = 0.0

    def clock(self) -> float:
        self.now += 0.5
        return self.now


def test_a_store_that_is_away_is_waited_for_some_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "here", clock := Clock())
    told: list[str] = []
    workers = _run(["a"], 10, lambda task, node, times: "away" if times < 8 else "done", told=told)
    assert len(workers.given) == 8
    assert 2 * 60 < clock.now < 10 * 60
    assert told[0] == "shard 0 has to wait (s3://bucket is away); it is tried again in 2 s"
    assert "again in 60 s" in told[-1]
    clock.now = 0.0
    with pytest.raises(Stopped, match=r"shard 0 could not be done: s3://bucket is away; once .* goes on"):
        _run(["a"], 10, lambda task, node, times: "away")
    assert 4 * 60 < clock.now < 15 * 60


def test_a_disk_that_is_full_is_tried_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "here", clock := Clock())
    with pytest.raises(Stopped, match="could not be done: s3://bucket is full"):
        _run(["a"], 10, lambda task, node, times: "full")
    assert clock.now < 60


def test_an_address_without_a_ray_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tried it for minutes: it is not asked."""
    monkeypatch.setattr("ray.init", lambda *args, **options: pytest.fail("Ray was asked"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = spec_for(tmp_path, ["line"])
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(RunError, match=rf"no Ray answers at '{address}' \(Connection refused\): correct --address"):
            run(spec, address=address)
    assert not Path(spec.output).exists()


def test_a_run_that_loses_workers_without_end_stops_and_says_so() -> None:
    with pytest.raises(Stopped, match=r"rows 0 to 9 of shard 0: every worker that takes them is lost.*goes on"):
        _run(["a"], 10, lambda task, node, times: "lost")
    counted: list[int] = []
    with pytest.raises(Stopped):
        _run(["a"], 1, lambda task, node, times: (counted.append(times), "lost")[1])
    assert len(counted) == LOSSES > ONE_NODE_DEATHS
