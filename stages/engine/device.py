"""Which device a stage works on."""

from __future__ import annotations

import torch


def gpu_count() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count()


def chosen_device(device: str | None) -> str:
    """The device by its name; ``auto`` or None takes the GPU where there is one."""
    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device)
