"""Clock, counts and memory of calls on a device; on the CPU by the same names."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Found = dict[str, Any]


def lost(error: Exception) -> bool:
    """Whether the device refuses all further work in this process. A graph that cannot be recorded is no such case."""
    text = str(error)
    return ("CUDA error" in text and "captur" not in text) or "device-side assert" in text


class Unavailable(RuntimeError):
    """A measure cannot be made on this machine; the message says what is missing."""


@dataclass
class Bench:
    """One run of the measures.

    Attributes:
        device: ``cuda`` or ``cpu``.
        toy: Networks of a few thousand numbers, and hardly any repetition.
        scratch: Folder for files that a measure needs.
        peaks: Operations a second of matrix products by type, from the measure ``card``.
    """

    device: str
    toy: bool
    scratch: Path
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sized(self, full: Any, toy: Any) -> Any:
        """A size of the published networks, or of the toys."""
        return toy if self.toy else full

    def timed(self, call: Callable[[], Any], seconds: float = 0.4) -> float:
        """Seconds a call, over as many as fill `seconds` (3 at least), after one that warms up and one that tells how
        many; the device is waited for at the ends alone."""
        call()
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        first = time.perf_counter() - began
        count = 2 if self.toy else max(3, min(1000, int(seconds / max(first, 1e-6))))
        began = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return (time.perf_counter() - began) / count

    def share(self, operations: float, seconds: float, dtype: str) -> float | None:
        """Of the card's measured peak in that type."""
        peak = self.peaks.get(dtype)
        return None if not peak else operations / seconds / peak

    def memory(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call takes at its peak, beside what was taken before; None on a CPU."""
        if not self.cuda:
            return None
        self.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def clear(self) -> None:
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def tried(self, found: Found, name: str, call: Callable[[], Any]) -> None:
        """One part of a measure: its result, or its error, under a name. The other parts go on, unless the device is
        lost."""
        try:
            found[name] = call()
        except Unavailable as error:
            found[name] = {"unavailable": str(error)}
        except Exception as error:
            if lost(error):
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.clear()

    def syncs(self, call: Callable[[], Any]) -> int:
        """How often a call makes the host wait for the device."""
        if not self.cuda:
            with HostReads() as reads:
                call()
            return reads.counts.total()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call's products, convolutions and attentions, after one that warms up: a model's
    first one also runs on the meta device, to learn what a row takes."""
    from torch.utils.flop_counter import FlopCounterMode

    call()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class HostReads(TorchFunctionMode):
    """Counts, on any device, the calls that on a GPU make the host wait: what reads a value (`item`, `bool`, `tolist`),
    asks how many there are (`nonzero`, a boolean index), or copies between host and device without pinned memory."""

    READS = frozenset({
        "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal",
        "allclose", "masked_select", "unique", "repeat_interleave",
    })  # fmt: skip
    COPIES = frozenset({"tensor", "as_tensor"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (
            name in self.READS
            or (name in self.COPIES and kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor))
            or (name in ("__getitem__", "__setitem__") and _boolean(args[1]))
        ):
            self.counts[name] += 1
        return func(*args, **kwargs)


def _boolean(index: Any) -> bool:
    """Whether an index holds a mask of several entries."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.dim() > 0 for part in parts)
