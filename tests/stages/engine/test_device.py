"""How much of a GPU is free."""

from __future__ import annotations

import pytest
import torch

from pipeline import machine
from stages.engine.device import free_bytes


@pytest.mark.parametrize(
    ("share", "free", "said"),
    [
        (1.0, 50, 55),  # what nobody holds, and 5 that this process holds and does not use
        (0.5, 50, 25),  # 40 of 80 are its own, 15 of them are used
        (0.5, 10, 15),  # the others took more than theirs
        (0.125, 50, 0),
    ],
)
def test_workers_that_share_a_card_are_told_their_part(
    monkeypatch: pytest.MonkeyPatch, share: float, free: int, said: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15)
    monkeypatch.setattr(machine.here, "gpu_share", share)
    assert free_bytes(torch.device("cuda")) == said
    assert free_bytes(torch.device("cpu")) is None
