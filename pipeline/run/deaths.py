"""What is known of tasks whose workers died, and what is to be done with their rows.

A row is condemned only after it was alone in two workers that died of themselves, on nodes that live: on two nodes if
there are two, else on the same one, with nothing else dying there meanwhile. What a node takes along counts for
nothing. A shard that has killed two workers is cut in halves; a half that kills one is cut again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.run.tasks import Outcome, Task

Verdict = Literal["again", "halve", "condemn", "stop"]
DEATHS = 2
"""Workers that a whole shard, and a single row, may kill."""
ONE_NODE_DEATHS = 4
"""Workers that a single row may kill where no worker of another node was free to try it."""
LOSSES = 30
"""Workers that may be lost on the same rows for whatever reason before a run stops to ask."""
Key = tuple[int, int, int]


@dataclass
class _Case:
    """Rows that a worker was lost on.

    Attributes:
        strikes: Workers that died of themselves on these rows with nothing else dying on their node: node, and how many
            had died there by then.
        died: Workers that died of themselves, whatever died beside them; lost: workers lost for whatever reason.
    """

    strikes: list[tuple[str, int]] = field(default_factory=list)
    died: int = 0
    lost: int = 0


class Deaths:
    """Keeps count. Tasks are told apart by their rows."""

    def __init__(self) -> None:
        self._cases: dict[Key, _Case] = {}
        self._own: Counter[str] = Counter()  # node -> workers that died there of themselves
        self._flying: dict[Key, Mapping[str, int]] = {}  # what `_own` was when these rows were handed out
        self._tried: set[Key] = set()
        self._nodes = 1

    def may_go(self, task: Task) -> bool:
        """Whether a task may be handed out now. Suspects are tried one at a time a node: each death has one culprit."""
        return not self._suspect(task) or len(self._tried) < self._nodes

    def given(self, task: Task) -> Task:
        """A task on its way to a worker: to one of a node that its rows have killed none on, if there is a choice."""
        self._flying[_key(task)] = dict(self._own)
        if self._suspect(task):
            self._tried.add(_key(task))
        case = self._cases.get(_key(task))
        avoid = () if case is None else tuple(sorted({node for node, _ in case.strikes}))
        return replace(task, avoid=avoid, alone=self.alone(task))

    def alone(self, task: Task) -> bool:
        """Whether its worker must have no other task: one has died on these rows, or on the shard that they are of."""
        case = self._cases.get(_key(task))
        return not task.whole or (case is not None and case.died > 0)

    def returned(self, task: Task) -> None:
        """It has ended, one way or another, and is settled."""
        self._flying.pop(_key(task), None)
        self._tried.discard(_key(task))

    def done(self, task: Task) -> None:
        """Its rows are acquitted."""
        self._cases.pop(_key(task), None)

    def preempted(self, task: Task) -> Verdict:
        """The node took the worker along, or was taken away."""
        case = self._cases.setdefault(_key(task), _Case())
        case.lost += 1
        return "stop" if case.lost >= LOSSES else "again"

    def died(self, task: Task, outcome: Outcome) -> Verdict:
        """The worker died of itself, or its device refused further work."""
        case = self._cases.setdefault(_key(task), _Case())
        case.died, case.lost = case.died + 1, case.lost + 1
        self._nodes = max(1, len(outcome.nodes))
        node, before = outcome.node, self._flying.get(_key(task), {}).get(outcome.node, 0)
        for other in self._cases.values():  # who died there since these rows were handed out has a rival for the blame
            other.strikes = [strike for strike in other.strikes if strike[0] != node or strike[1] <= before]
        alone = self._own[node] == before
        self._own[node] += 1
        if alone:
            case.strikes.append((node, self._own[node]))
        if case.lost >= LOSSES:
            return "stop"
        living = [struck for struck, _ in case.strikes if struck in outcome.nodes or not outcome.nodes]
        if task.pieces or task.condemned:
            return "stop" if len(living) > ONE_NODE_DEATHS else "again"
        if task.stop - task.start > 1:
            return "halve" if case.died >= (DEATHS if task.whole else 1) else "again"
        elsewhere = len(set(living)) > 1 or len(outcome.nodes) < 2
        guilty = len(living) >= (DEATHS if elsewhere else ONE_NODE_DEATHS)
        return "condemn" if guilty else "again"

    def count(self, task: Task) -> int:
        """Workers that these rows have killed, as far as they are to blame."""
        return len(self._cases.get(_key(task), _Case()).strikes)

    def _suspect(self, task: Task) -> bool:
        """A row alone that a worker has died on."""
        case = self._cases.get(_key(task))
        return case is not None and case.died > 0 and task.stop - task.start == 1 and task.condemned is None


def _key(task: Task) -> Key:
    return (task.shard, task.start, task.stop)
