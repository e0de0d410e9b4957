"""How much of a GPU is free."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline import machine
from stages.engine.device import device_kind, free_bytes
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings


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


def test_devices_of_a_kind_hold_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one ran out of, the other does."""
    models = (("H100", 80), ("H100", 80), ("H100", 94), ("A100", 80))
    cards = {f"cuda:{n}": SimpleNamespace(name=name, total_memory=size) for n, (name, size) in enumerate(models)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[str(device)])
    first, second, larger, older = (device_kind(torch.device(name)) for name in cards)
    assert first == second
    assert len({first, larger, older, device_kind(torch.device("cpu"))}) == 4
    monkeypatch.setattr(machine.here, "gpu_share", 0.5)
    assert device_kind(torch.device("cuda:0")) != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_in_float32_are_not_rounded_to_tf32_on_a_gpu(dtype: str) -> None:
    """As PyTorch would have it for their convolutions: LBO's tolerance follows the dtype that the job names."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        open_latent_model(LatentModelSettings(device="cpu", dtype=dtype))  # type: ignore[arg-type]
        assert torch.backends.cudnn.allow_tf32 == (dtype == "bfloat16")
        assert torch.get_float32_matmul_precision() == ("high" if dtype == "bfloat16" else "highest")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
