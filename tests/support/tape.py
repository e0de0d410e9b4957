"""A stand-in for CUDA graphs on any machine: what operations a call dispatches is written down with the tensors they
were given, and done again on a replay, whose outputs are new where the recording's were and the same tensors where they
lay outside. What CUDA refuses to record is refused: whatever the host has to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Tape(TorchDispatchMode):
    """What is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        waits = func in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
        if waits or func in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        made = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, made))
        return made

    def replay(self) -> None:
        known: dict[int, torch.Tensor] = {}

        def now(one: Any) -> Any:
            return known.get(id(one), one) if isinstance(one, torch.Tensor) else one

        for func, args, kwargs, made in self.operations:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for was, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(was, torch.Tensor):
                    known[id(was)] = new


def capture(step: Callable[[], None], warmup: int = 3) -> Callable[[], None]:
    """`stages.engine.solver.capture`."""
    for _ in range(warmup):
        step()
    tape = Tape()
    with torch.inference_mode(), tape:
        step()
    return torch.no_grad()(tape.replay)
