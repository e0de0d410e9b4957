"""How much memory a network's activations take, told from its configuration alone.

The network is built on the meta device, where tensors have shapes and no numbers, and run once; whatever it allocates
is added up while it lives. Attention counts as fused (queries, keys, values and result are kept, the square matrix is
not), as it runs on a GPU. On the CPU, autograd keeps what is told here within a tenth
(tests/stages/models/test_memory.py). What a GPU's kernels allocate for themselves is told by `WORKSPACE`.

Where not one row of a kind of work fits with its gradient, the network computes its blocks again on the way back
(`stages.models.recompute`): half as much time again, for a third of the memory or a tenth.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.engine.device import free_bytes
from stages.engine.room import ANY
from stages.models.recompute import recompute, recomputes

if TYPE_CHECKING:
    from stages.models.latent import LatentModel

Call = Literal["predict", "encode", "decode"]


class Live(TorchDispatchMode):
    """Adds up the storages that operations make, while they live.

    Attributes:
        now, peak: Bytes.
    """

    def __init__(self, given: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # there before: what views of it come out is nothing new
                self.known.add(tensor.untyped_storage()._cdata)
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
        if func is torch.where and isinstance(args[-1], torch.Tensor) and args[-1].is_meta:
            args = (args[0].to("meta"), *args[1:])  # a mask that has to have numbers is made on the CPU
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return func(*args, **kwargs)


def on_meta(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A frozen network of a class of diffusers, with shapes and no numbers."""
    with torch.device("meta"):
        network = kind.from_config(dict(config)).eval().requires_grad_(False)
    torch.nn.Module.to(network, dtype)  # diffusers' own `to` warns of parts to be kept in float32: there are none
    return network


def peak_bytes(like: Any, call: Callable[[Any], torch.Tensor], x: torch.Tensor, *, gradient: bool) -> int:
    """The most that activations take at once during a call of a frozen network, in bytes.

    Args:
        like: A network of diffusers; its configuration and type are read, and whether it computes its blocks again; its
            weights are not used.
        call: Runs a network on `x`.
        x: The input on the meta device; with `gradient` the call is followed by a backward pass to it.
    """
    network = on_meta(type(like), like.config, like.dtype)
    if recomputes(like):
        recompute(network, _Fused)  # the mode is off in a backward pass
    return peak_of(lambda x: call(network), x, (*network.parameters(), *network.buffers()), gradient=gradient)


def peak_of(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor], *, gradient: bool
) -> int:
    """The same of a function of `x`, with the weights that it uses."""
    x.requires_grad_(gradient)
    with torch.set_grad_enabled(gradient), Live([x, *weights]) as live, _Fused():
        result = call(x)
        if gradient:
            torch.autograd.grad(result.sum(), x)
    return live.peak


SHARE = 0.8
"""Of the free memory that activations may take: convolutions have workspaces, and an allocator has gaps."""
CONTEXT = 10**9
"""Bytes that CUDA takes of a card before anything else does."""
WORKSPACE = 1.1
"""What is added to what is counted of an autoencoder, whose convolutions copy what they read into another layout: with
`SHARE` it leaves room for 1.37 times what is counted, where an H200 took 1.08 to 1.36 times (`make gpu`, measure
``memory``). Of denoisers it took .88 to 1.04 times."""
MOST_SLOTS = 64
"""Beyond it a network of these sizes gains nothing."""
WORK: dict[str, tuple[tuple[Call, bool], ...]] = {
    "predict": (("predict", False),),
    "gradient": (("predict", True),),
    "null-text": (("predict", True),),
    "encode": (("encode", False),),
    "decode": (("decode", False),),
    "boost": (("decode", True),),
    "draw": (("predict", False), ("predict", False)),
    "select": (("predict", True), ("decode", True)),
}
"""Kind of work -> the calls, with or without their backward pass, that a row of it makes; `draw` is guided, its two
halves in one call."""
DIFFERENTIATED: tuple[Literal["predict", "decode"], ...] = ("predict", "decode")
"""Calls that gradients are taken through."""


def row_bytes(model: LatentModel, work: str) -> int:
    """What a row of a kind of `WORK` adds to a device's memory at its peak: that of its largest call, since no call's
    activations outlive it (seed-select computes each call again on the way back)."""
    return max(row_bytes_on(model, work).values())


def row_bytes_on(model: LatentModel, work: str) -> dict[torch.device, int]:
    """The same of each device that the model lies on. What is kept for a gradient lies where the blocks do; without
    one a card holds a block's activations at a time, the same on each."""
    needs: dict[torch.device, int] = {}
    for (call, gradient), count in Counter(WORK[work]).items():
        counted = count * model.activation_bytes(call, gradient=gradient)
        each = counted if call == "predict" else int(WORKSPACE * counted)
        for device, share in model.lies(call).items():
            needs[device] = max(needs.get(device, 1), int(each * share) if gradient else each)
    return needs


def fitting(model: LatentModel, work: str, rows: int = 1) -> int:
    """Rows of a kind of work that the free memory of the model's devices takes, 1 at least; `ANY` where there is no
    telling. Where not so many `rows` fit, what can be computed again on the way back is from now on."""
    if work not in WORK or free_bytes(model.device) is None:
        return ANY
    needs = row_bytes_on(model, work)
    free = {device: free_bytes(device) or 0 for device in needs}
    while any(rows * each > SHARE * free[device] for device, each in needs.items()) and relieve(model, work):
        needs = row_bytes_on(model, work)
    return min(rows_in(free[device], each) for device, each in needs.items())


def relieve(model: LatentModel, work: str) -> bool:
    """Make a row of a kind of work take less: the largest of its calls that has a backward pass computes its blocks
    again. False: all do."""
    calls = [call for call in DIFFERENTIATED if (call, True) in WORK.get(work, ())]
    largest_first = sorted(calls, key=lambda call: model.activation_bytes(call, gradient=True), reverse=True)
    return any(model.recompute(call) for call in largest_first)


def rows_in(free: int, each: int) -> int:
    """How many rows of so many bytes the free memory takes, 1 at least."""
    return max(1, int(SHARE * free) // each)


def rows_on(card: int, weights: int, each: int) -> int:
    """How many rows of so many bytes a card of so many takes beside the weights and what CUDA itself needs; 0: none."""
    free = card - CONTEXT - weights
    return rows_in(free, each) if free > each else 0


def weight_bytes(model: Any) -> int:
    """Of the networks that a model holds, text encoders among them where it has any."""
    networks = [getattr(model.pipeline, part) for part in model.geometry.parts]
    return sum(weight.numel() * weight.element_size() for network in networks for weight in network.parameters())


def fitting_slots(model: LatentModel, work: str, *, otherwise: int, rows: int = 1) -> int:
    """Slots where the job names no number: a power of two, `MOST_SLOTS` at most.

    Args:
        work: That a slot's row does.
        otherwise: Where memory does not tell.
        rows: That a slot puts into one call.
    """
    room = model.rooms[work]
    if room.rows < rows:
        room.rows = fitting(model, work, rows)
    return otherwise if room.rows >= ANY else power_of_two(room.rows // rows)


def power_of_two(fit: int) -> int:
    """The largest one that fits, from 1 to `MOST_SLOTS`."""
    return 1 << (min(max(fit, 1), MOST_SLOTS).bit_length() - 1)
