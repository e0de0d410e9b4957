"""Rows that go several ways in turns: all come out, once, and no way runs empty while rows come."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest
import torch

from pipeline.contract import Row, failed, ok
from stages.engine.passthrough import PAUSE, in_batches
from stages.engine.solver import Occupancy, solve
from stages.engine.turns import in_turns


class Countdown:
    """Slots that rows stay in for as many steps as they say."""

    def __init__(self, slots: int) -> None:
        self.slots, self.rows, self.left_B = slots, dict[int, Row](), torch.zeros(slots, dtype=torch.int64)

    def load(self, slots: list[int], rows: list[Row]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot], self.left_B[slot] = row, row["steps"]

    def step(self) -> torch.Tensor:
        self.left_B -= 1
        return self.left_B <= 0

    def unload(self, slots: list[int]) -> list[Row]:
        return [ok(self.rows.pop(slot)) for slot in slots]


def rows(count: int, ways: list[str], seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [{"id": str(i), "way": draw.choice(ways), "steps": draw.randint(1, 9)} for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_slots_of_every_way_stay_full(seed: int) -> None:
    fullness = {name: Occupancy() for name in ("a", "b", "c")}
    pulled, out = 0, list[tuple[str, str]]()

    def source() -> Iterator[Row]:
        nonlocal pulled
        for row in given:
            pulled += 1
            yield row

    def solved(name: str) -> object:
        return lambda rows: solve(Countdown(5), rows, occupancy=fullness[name])

    def batched(rows: Iterable[Row]) -> Iterator[Row]:
        return in_batches(in_batches(rows, 4, lambda some: some), 3, lambda some: map(ok, some))

    given = rows(600, [*fullness, "d"], seed)
    ahead = 0
    ways = {**{name: solved(name) for name in fullness}, "d": batched}
    for name, row in in_turns(source(), ways, lambda row: row["way"], 15):  # type: ignore[arg-type]
        out.append((name, row["id"]))
        ahead = max(ahead, pulled - len(out))
    assert sorted(out, key=lambda one: int(one[1])) == [(row["way"], row["id"]) for row in given]
    assert ahead <= 15 + 1 + 3 * (2 * 5) + 7  # waiting, and inside of the ways
    assert all(one.share > 0.95 for one in fullness.values())
    assert all(one.rows == sum(row["way"] == name for row in given) for name, one in fullness.items())


def test_a_way_without_rows_ends() -> None:
    ways = {"a": lambda rows: rows, "b": lambda rows: in_batches(rows, 3, lambda some: some)}
    assert list(in_turns([], ways, lambda row: "a", 1)) == []  # type: ignore[arg-type]
    assert list(in_turns([{"id": "x"}], ways, lambda row: "b", 1)) == [("b", {"id": "x"})]  # type: ignore[arg-type]


def test_a_batch_ends_where_rows_pause_and_nothing_else_is_lost() -> None:
    given = [{"id": "0"}, failed({"id": "1"}, "no"), PAUSE, PAUSE, {"id": "2"}, {"id": "3"}, {"id": "4"}]
    seen = []

    def work(some: list[Row]) -> list[Row]:
        seen.append([row["id"] for row in some])
        return some

    out = list(in_batches(given, 2, work))
    assert [row["id"] for row in out] == ["1", "0", "", "", "2", "3", "4"]
    assert [row is PAUSE for row in out] == [row["id"] == "" for row in out]
    assert seen == [["0"], ["2", "3"], ["4"]]
