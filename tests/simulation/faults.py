"""Faults that the runtime once had, to be put back: the simulation has to find each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

from pipeline import machine
from pipeline.output import commit, dataset, log, planfile, publish
from pipeline.output import lock as locks
from pipeline.output.commit import Record
from pipeline.output.dataset import Output
from pipeline.output.fold import Folding
from pipeline.output.leftovers import remove
from pipeline.output.lock import Lock, OutputLocked
from pipeline.run import plan
from tests.simulation import pool, schedule, store


def _swallowing(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    with machine.here.threads(threads) as pool:
        rest = iter(items)
        window = deque(pool.submit(function, item) for item in islice(rest, threads))
        while window:
            yield window.popleft().result()
            window.extend(pool.submit(function, item) for item, _ in zip(rest, range(1), strict=False))


def _any_namespace(content: Mapping[str, Any]) -> bool | None:
    mine = machine.here.process()
    if content["damaged"] or (content["host"], content["boot"]) != (mine["host"], mine["boot"]):
        return False if content["damaged"] else None
    return machine.here.began(content["pid"]) == content["process"]


def _by_time_stamp(self: Lock) -> int:
    left = locks.holder(self._folder)
    if left is not None and not left["stale"]:
        raise OutputLocked("held")
    return self._take(locks.latest_epoch(self._folder) + 1)


def _removed_first(self: Folding) -> None:
    records, self._records = list(self._records.values()), {}
    remove(self._output, [record.name for record in records])
    self._write([(record.shard, record.generation, record) for record in records])


def _beside_the_log(self: Output) -> tuple[dict[int, tuple[str, int]], dict[str, Any]]:
    self.log.look(self.folder, self.run, self._several_small)
    listed = self.folder.listing(commit.RECORDS)
    named = {name: commit.recorded(name, self.run) for name in listed}
    mine = {name: of for name, of in named.items() if of is not None}
    return {log.key(*of): (f"{commit.RECORDS}/{name}", listed[name]) for name, of in mine.items()}, {}


@contextmanager
def _tables_without_run() -> Iterator[None]:
    """All schedules are planned by tasks, which takes longer: more go wrong while it goes on."""
    with patch.object(planfile, "table_name", lambda run, table: table), patch.object(schedule, "TASKS", 1):
        yield


@contextmanager
def _names_without_run() -> Iterator[None]:
    """Workers stand still more often where they are about to end a file."""
    with patch.object(dataset, "parts", lambda plan: "data/part-*.parquet"), patch.object(pool, "LATE", 5.0):
        yield


@contextmanager
def _written_over() -> Iterator[None]:
    """The store says that it refuses a taken name at the end of an upload, and does not."""
    put = store._Writing._put

    def over(self: store._Writing, content: bytes) -> None:
        self._once = self._once and self._path.endswith(".probe")
        put(self, content)

    with patch.object(store._Writing, "_put", over), patch.object(pool, "LATE", 5.0):
        yield


_publish_part = publish._publish_part


def _left_as_it_is(output: Output, listed: dict[str, dict[str, int]], record: Record) -> Record:
    taken = output.part(record.shard).rpartition("/")[2] in listed["data"]
    return record if output.named_at_commit and taken else _publish_part(output, listed, record)


@contextmanager
def _cut_anew() -> Iterator[None]:
    """Without the look whether a plan that grows begins as it did."""
    survey = schedule._survey

    def wherever(source: Any, every: int, limit: int, totals: Any, seen: Any, *rest: Any) -> Iterator[Any]:
        return survey(source, every, limit, totals, seen, *rest[:-1], ())

    unseen = patch.multiple(plan._Before, shard=lambda *args: None, end=lambda *args: None)
    with patch.object(schedule, "_survey", wherever), unseen:
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "names are lost where records are read several at a time": lambda: patch.object(machine, "several", _swallowing),
    "records and attempts bear no run": lambda: patch.object(plan, "RUN_DIGITS", 0),
    "process numbers of another namespace are looked up": lambda: patch.object(locks, "_alive", _any_namespace),
    "a holder is judged by its time stamp": lambda: patch.object(Lock, "_acquire", _by_time_stamp),
    "records are removed before the file that they are folded into is there": lambda: patch.object(
        Folding, "_fold", _removed_first
    ),
    "a shard and generation that was withdrawn is given out again": lambda: patch.object(
        log.Log, "generations", lambda self, but: {}
    ),
    "a record counts though its shard is in the log": lambda: patch.object(Output, "_look", _beside_the_log),
    "who has lost the lock goes on": lambda: patch.object(Lock, "check", lambda lock: None),
    "tables of a plan bear no run": _tables_without_run,
    "a plan that grows cuts its rows anew": _cut_anew,
    "a final name that is taken is written over": _written_over,
    "final names bear no run": _names_without_run,
    "a file that has a final name and no record stays": lambda: patch.object(publish, "_publish_part", _left_as_it_is),
}
