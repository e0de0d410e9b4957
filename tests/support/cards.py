"""Two cards on any machine: devices ``card:0`` and ``card:1``, whose numbers lie on the CPU and may not be mixed.

PyTorch knows them as a backend of their own (its "PrivateUse1"), so that modules go there with `to`, gradients come
back through them, and whatever forgets to bring a tensor along fails as it would on CUDA. The arithmetic is the CPU's:
results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "card"
COUNT = 2
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
"""Operations that bring numbers from one device to another."""
INDEXED = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip
"""Operations that CUDA lets have indices on the CPU."""


class OnCard(torch.Tensor):
    """A tensor that says it lies on a card. Its numbers: `raw`, on the CPU."""

    raw: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False) -> OnCard:
        if isinstance(raw, OnCard):  # accelerate makes a weight of one again
            return raw.detach().requires_grad_(requires_grad)  # type: ignore[return-value]
        with torch.inference_mode(False):  # views of weights are no tensors of an inference
            made = torch.Tensor._make_wrapper_subclass(
                cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
                device=torch.device(NAME, 0),
            )  # fmt: skip
        made.raw, made.place = raw, device
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd has done so
            return func.decompose(*args, **kwargs or {})
        return carried_out(func, args, kwargs or {})

    @property  # type: ignore[override]
    def device(self) -> torch.device:
        """Python's answer: autograd knows one card alone."""
        return self.place

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        target = torch._C._nn._parse_to(*args, **{key: kwargs[key] for key in kwargs.keys() - {"copy"}})[0]
        if target is not None and target.type == NAME and (target.index or 0) != self.place.index:
            return _Carried.apply(self, torch.device(NAME, target.index or 0)).to(*args, **kwargs)
        return super().to(*args, **kwargs)

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnCard) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw!r} on {self.device}"


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`, as its documentation writes it out; PyTorch's own would make
    its masks on the first card, whatever card it works on."""
    if not isinstance(query, OnCard):
        return ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    weights = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
    return weights.softmax(-1) @ value


ATTENTION = functional.scaled_dot_product_attention


class _Carried(torch.autograd.Function):
    """From card to card, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: OnCard, device: torch.device) -> OnCard:
        ctx.home = x.place
        return OnCard(x.raw.clone(), device)

    @staticmethod
    def backward(ctx: Any, grad: OnCard) -> tuple[OnCard, None]:  # type: ignore[override]
        return OnCard(grad.raw.clone(), ctx.home), None


class _Module(_DummyBackendModule):
    """`torch.card`."""

    def device_count(self) -> int:
        return COUNT

    @contextmanager
    def device(self, _: Any) -> Iterator[None]:
        yield

    def get_rng_state(self, _: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, _: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def card(number: int = 0) -> str:
    """The name of a card, which is there from now on; autograd knows it if it has done nothing before (`-m card`)."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        every.fallback(_default, "PrivateUse1")
        for func in (aten.copy_, aten._local_scalar_dense):  # `torch.tensor` calls them below the fallback
            own.impl(func.default, partial(_default, func.default), "PrivateUse1")
        every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # casts nothing
        _KEPT.extend((every, own))
    return f"{NAME}:{number}"


_KEPT: list[torch.library.Library] = []
"""What is registered goes with its library."""


def _default(func: Any, *args: Any, **kwargs: Any) -> Any:
    return carried_out(func, args, kwargs)


def carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, of tensors that lie where CUDA would take them."""
    given = list(_leaves((*args, *kwargs.values())))
    asked = kwargs.get("device")
    if func is aten._to_copy.default and isinstance(args[0], OnCard) and asked is not None and asked.type == NAME:
        asked = args[0].place  # for another type alone: to another card `OnCard.to` brings it
    device = _common(func, args, given) if asked is None else torch.device(asked)
    if device.type == NAME and device.index is None:
        device = torch.device(NAME, 0)
    _check_generators(func, given, device)
    here = {"device": torch.device("cpu")} if device.type == NAME and asked is not None else {}
    raw_args, raw_kwargs = _each(_raw, args), {key: _each(_raw, value) for key, value in (kwargs | here).items()}
    made = func(*raw_args, **raw_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if func is aten._to_copy.default and device.type == NAME and made is raw_args[0]:
        made = made.clone()
    own = {id(one.raw): one for one in given if isinstance(one, OnCard)}

    def shown(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or device.type != NAME:
            return one
        if id(one) not in own:
            return OnCard(one, device)
        known = own[id(one)]
        if known.shape != one.shape:  # `out` of a fresh tensor
            known.data = OnCard(one, device)
        return known

    return _each(shown, made)


def _common(func: Any, args: Any, given: list[Any]) -> torch.device:
    """Where an operation takes place.

    Raises:
        RuntimeError: Its tensors lie apart.
    """
    tensors = [one for one in given if isinstance(one, torch.Tensor)]
    if func in INDEXED:  # indices may lie on the CPU
        tensors = [args[0], *(one for one in args[1] if isinstance(one, OnCard)), *args[2:3]]
    # A number of the CPU's may stay; Python's numbers autograd puts beside `where`'s tensors, on the one card it knows.
    devices = {one.device for one in tensors if one.dim() or (one.device.type != "cpu" and func is not aten.where.self)}
    if func in MOVES:
        return tensors[0].device
    if len(devices) > 1:
        told = ", ".join(f"{one.device}{tuple(one.shape)}" for one in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found: {told}")
    return next(iter(devices), torch.device(NAME, 0))


def _check_generators(func: Any, given: list[Any], device: torch.device) -> None:
    for one in given:
        if isinstance(one, torch.Generator) and one.device.type != device.type:
            raise RuntimeError(f"{func}: expected a {device.type!r} device type for generator but found {one.device}")


def _raw(one: Any) -> Any:
    return one.raw if isinstance(one, OnCard) else one


def _leaves(given: Any) -> Iterator[Any]:
    for one in given:
        if isinstance(one, tuple | list):
            yield from _leaves(one)
        else:
            yield one


def _each(change: Callable[[Any], Any], given: Any) -> Any:
    """A value with what is in it changed; PyTorch's own walk over trees takes longer than the operations."""
    if isinstance(given, tuple | list):
        return type(given)([_each(change, one) for one in given])
    return change(given)
