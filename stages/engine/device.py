"""Which device a stage works on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import machine


def gpu_count() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count()


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody holds, or that this process holds and does not use, within its share of the card
    where workers have one together; None of another device."""
    if device.type != "cuda":
        return None
    free, card = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    own = int(min(1.0, machine.here.gpu_share) * card) - used
    return max(0, min(int(free) + torch.cuda.memory_reserved(device) - used, own))


def device_kind(device: torch.device) -> str:
    """What all devices share that hold as much: model, memory, and how much of it this process may fill."""
    if device.type != "cuda":
        return device.type
    facts = torch.cuda.get_device_properties(device)
    return f"{machine.here.gpu_share:g} of {facts.name}, {facts.total_memory} bytes"


def chosen_devices(device: str | None) -> tuple[str, ...]:
    """The devices by their names, separated by commas; ``auto`` or None takes the GPUs that this process was given."""
    if device not in (None, "auto"):
        return tuple(name.strip() for name in str(device).split(","))
    if not torch.cuda.is_available():
        return ("cpu",)
    count = min(gpu_count(), int(machine.here.gpu_share))
    return tuple(f"cuda:{number}" for number in range(count)) if count > 1 else ("cuda",)


def sent(values: Any, device: torch.device | str | None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the host as a tensor on a device, without waiting until that is idle, as an ordinary copy to a GPU
    does. For the small ones of every step."""
    held = torch.as_tensor(values, dtype=dtype)
    if device is None or torch.device(device).type != "cuda" or held.is_cuda:
        return held.to(device)
    return held.pin_memory().to(device, non_blocking=True)


def without_cudnn_attention() -> AbstractContextManager[Any]:
    """Attention by PyTorch's other kernels: cuDNN's may fail on the way back ("mha_graph.execute ... is_good()"), as it
    did on every gradient of FLUX's transformer at 32 numbers a head (H200, PyTorch 2.11; pytorch issue 190321)."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def chosen_device(device: str | None) -> str:
    """The first of them: the one that works where the work is not shared out."""
    return chosen_devices(device)[0]


def exact_float32(exact: bool) -> None:
    """Whether a GPU multiplies float32 numbers as they are, or rounded to TF32 (10 bits of mantissa), much faster.

    PyTorch's own way is exact for products of matrices and rounded for convolutions. So a U-Net in float32 would have
    the noise of half precision, and tolerances that follow its type could not be met.
    """
    torch.backends.cudnn.allow_tf32 = not exact
    torch.set_float32_matmul_precision("highest" if exact else "high")


HALVED_ON = frozenset({"cuda"})
"""Kinds of devices on which what no setting gives a type runs in half precision."""


def unasked_dtype(device: str, half: torch.dtype = torch.float16) -> torch.dtype:
    """The type of networks whose type no setting names (decoders, a trained prior): half precision on a GPU."""
    return half if torch.device(device).type in HALVED_ON else torch.float32
