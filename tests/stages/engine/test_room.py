"""Rows that the device takes at once."""

from __future__ import annotations

import pytest
import torch

from stages.engine.room import Room
from tests.support.capped import Capped


class Network:
    """Takes so many rows, and no more."""

    def __init__(self, most: int) -> None:
        self.most, self.given = most, list[int]()

    def __call__(self, x_BC: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
        self.given.append(len(x_BC))
        if len(x_BC) > self.most:
            raise torch.OutOfMemoryError("pretend")
        return 2 * x_BC + told["shift"]


def test_a_batch_that_does_not_fit_goes_in_parts_and_the_next_one_at_once() -> None:
    x_BC, told = torch.randn(11, 3), {"shift": torch.randn(11, 3)}
    network, room = Network(3), Room()
    assert torch.equal(room(network, x_BC, told), 2 * x_BC + told["shift"])
    assert network.given == [11, 5, 2, 2, 2, 2, 2, 1]
    network.given.clear()
    room(network, x_BC, told)
    assert network.given == [2, 2, 2, 2, 2, 1]  # nothing is refused any more


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Room()(Network(0), torch.zeros(3, 1), {"shift": torch.zeros(3, 1)})


def test_what_leads_back_into_the_batch_is_run_as_a_whole() -> None:
    x_BC = torch.randn(4, 2)
    for part in ("x", "told"):
        shift = torch.zeros(4, 2, requires_grad=part == "told")
        with pytest.raises(torch.OutOfMemoryError):
            Room()(Network(3), x_BC.requires_grad_(part == "x"), {"shift": shift})
    with torch.no_grad():
        assert len(Room()(Network(3), x_BC, {"shift": torch.zeros(4, 2)})) == 4


def test_the_cap_of_the_tests_counts_what_lives() -> None:
    weight = torch.zeros(1000)
    with Capped(10_000) as live:
        kept = torch.zeros(1000)
        for _ in range(20):
            torch.zeros(1000)  # gone at once
        weight.view(10, 100)  # there before
        assert live.now == 4000
        assert live.peak == 8000
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2000)
        del kept
        torch.zeros(2000)
