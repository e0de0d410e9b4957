"""Denoisers whose repeated blocks PyTorch compiles: one graph serves all layers that are alike (regional compilation).

Fused kernels round otherwise than one operation after another: outputs differ by the type's rounding, and seeds by what
a step's tolerance leaves open (tests/stages/models/test_compiled.py). Where a gradient is asked for the blocks run as
they are: what computes them again on the way back (`stages.models.recompute`) has to meet the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

GRAPHS = 64
"""Most of one kind of block: widths x sizes of pictures x (one row, the usual number, any number). PyTorch stops at 8,
and runs what is beyond them uncompiled."""


def compile_blocks(network: Any) -> None:
    """Have a frozen denoiser of diffusers run its repeated blocks compiled from now on; they are compiled when they are
    first called with what no graph is for. Call it once the network lies where it will run (`check_compiler`).
    """
    for block in repeated_blocks(network):
        block.forward = partial(_run, block.forward, torch.compile(block.forward))


def _run(eager: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return eager(*args, **kwargs)
    settings: Any = torch._dynamo.config  # each thread has its own; not imported above: it takes two seconds
    if settings.recompile_limit < GRAPHS:
        settings.recompile_limit = GRAPHS
    return compiled(*args, **kwargs)


def repeated_blocks(network: Any) -> Iterator[nn.Module]:
    """The blocks that diffusers names; where it names none, the members of the network's own lists."""
    if names := network._repeated_blocks:
        yield from (block for block in network.modules() if type(block).__name__ in names)
    else:
        for child in network.children():
            if isinstance(child, nn.ModuleList):
                yield from child


def check_compiler(device: torch.device | str) -> None:
    """Compile something small.

    Raises:
        ValueError: It fails: there is no C++ compiler, or no Triton.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"accelerate: compile: PyTorch cannot compile for {torch.device(device).type} on this machine ({reason}): "
            "install what it asks for (a C++ compiler; for a GPU Triton too), or leave `accelerate` out"
        ) from error


def _probe(x_N: torch.Tensor) -> torch.Tensor:
    return x_N.sin() + x_N
