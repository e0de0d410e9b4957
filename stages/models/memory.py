"""How much memory a network's activations take, told from its configuration alone.

The network is built on the meta device, where tensors have shapes and no numbers, and run once; whatever it allocates
is added up while it lives. Attention counts as fused (queries, keys, values and result are kept, the square matrix is
not), as it runs on a GPU. What is allocated inside a kernel (convolution workspaces) and what an allocator rounds up to
are left out. On the CPU, autograd keeps
what is told here within a tenth (tests/stages/models/test_memory.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, while they live."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return func(*args, **kwargs)


def peak_bytes(like: Any, call: Callable[[Any], torch.Tensor], x: torch.Tensor, *, gradient: bool) -> int:
    """The most that activations take at once during a call of a frozen network, in bytes.

    Args:
        like: A network of diffusers; its configuration and type are read, its weights are not used.
        call: Runs a network on `x`.
        x: The input on the meta device; with `gradient` the call is followed by a backward pass to it.
    """
    with torch.device("meta"):
        network = type(like).from_config(like.config).eval().requires_grad_(False)
    torch.nn.Module.to(network, like.dtype)  # diffusers' own `to` warns of parts to be kept in float32: there are none
    x.requires_grad_(gradient)
    given = [x, *network.parameters(), *network.buffers()]
    with torch.set_grad_enabled(gradient), _Live(given) as live, _Fused():
        result = call(network)
        if gradient:
            torch.autograd.grad(result.sum(), x)
    return live.peak
