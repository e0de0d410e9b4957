"""What Prometheus is told of a run."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from pipeline.contract import halvings
from pipeline.failures import Fault
from pipeline.run.meters import COUNTERS, GAUGES, Meters, label
from pipeline.run.tasks import Outcome
from stages.engine.room import Room


@pytest.mark.parametrize("path", ["/data/out", "s3://bucket/out put"])
def test_a_path_in_ascii_is_its_own_label(path: str) -> None:
    assert label(path) == path


@pytest.mark.parametrize("path", ["/data/Bäume", "/data/日本", "/data/\udcff"])
def test_any_output_can_be_counted(path: str, local_ray: str) -> None:
    assert label(path).isascii()
    assert label(path) != label("/data/Baume")
    meters = Meters(path, 4)
    meters.turn(1, 0, 4)
    meters.committed(2, 1, 1)


class Heard:
    """A counter or gauge that adds up what it is told, by name and labels."""

    values: ClassVar[dict[tuple[str, ...], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name.removeprefix("latentmill_"), set(tag_keys)

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == self.keys
        return (self.name, *(value for key, value in tags.items() if key != "output"))

    def inc(self, amount: float, tags: dict[str, str]) -> None:
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0) + amount

    def set(self, amount: float, tags: dict[str, str]) -> None:
        self.values[self._key(tags)] = amount


def test_what_an_operator_asks_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    monkeypatch.setattr(metrics, "Counter", Heard)
    monkeypatch.setattr(metrics, "Gauge", Heard)
    monkeypatch.setattr(Heard, "values", {})
    meters = Meters("out", 10)
    meters.ended(Outcome("done", halvings=2))
    meters.ended(Outcome(Fault.TRANSIENT, reason="the store is away"))
    meters.ended(Outcome(Fault.POISON, halvings=1))
    meters.retried()
    meters.retried(2)
    meters.committed(5, 1, 0)
    for deaths in (0, 2, 2, 3):
        meters.turn(3, deaths, 6)
    assert Heard.values == {
        ("rows_planned",): 10, ("rows_done",): 6, ("workers",): 3, ("worker_deaths",): 3, ("shards",): 1,
        ("rows", "ok"): 5, ("rows", "failed"): 1, ("retries",): 3, ("out_of_memory",): 3,
        ("task_failures", "transient"): 1, ("task_failures", "poison"): 1,
    }  # fmt: skip
    assert {name for name, *_ in Heard.values} == {*COUNTERS, *GAUGES}


def test_halvings_are_counted_once() -> None:
    halvings.taken()
    room = Room()

    def work(part: slice) -> int:
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError
        return part.stop - part.start

    assert sum(room.parts(8, work)) == 8
    assert (halvings.taken(), halvings.taken()) == (2, 0)
