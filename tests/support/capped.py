"""A device that runs out of memory, on any machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from stages.models.memory import Live


class Capped(Live):
    """Refuses, as an allocator does, what would make more live at once than `limit` bytes."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def _see(self, storage: torch.UntypedStorage) -> None:
        super()._see(storage)
        if self.now > self.limit:
            raise torch.OutOfMemoryError(f"{self.now} bytes are more than {self.limit}")


class Cap:
    """A function with so many bytes to itself.

    Attributes:
        limit: Without one, only the peak is taken down.
        peak: Most that was live in a call that went through.
        refused: Calls that ran out.
    """

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work, self.limit, self.peak, self.refused = work, math.inf, 0, 0

    def __get__(self, instance: Any, kind: Any = None) -> Callable[..., Any]:
        return self if instance is None else lambda *given, **named: self(instance, *given, **named)

    def __call__(self, *given: Any, **named: Any) -> Any:
        with Capped(self.limit) as live:
            try:
                result = self.work(*given, **named)
            except torch.OutOfMemoryError:
                self.refused += 1
                raise
        self.peak = max(self.peak, live.peak)
        return result
