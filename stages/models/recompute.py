"""Activation checkpointing: on the way back a network computes its blocks again instead of keeping what is in them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. Only the blocks' inputs are kept. The gradients are
the same numbers; a backward pass costs one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

MISCALLED = ("ChromaTransformer2DModel",)
"""Transformers of diffusers that call blocks to be computed again with less than they call them with otherwise: the
velocity would be another one wherever a gradient is asked for."""


def recompute(network: Any, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> bool:
    """Make a frozen network of diffusers do so from now on, wherever a gradient is asked for.

    A denoiser's blocks are those that diffusers computes again (Chroma's it would without their mask). An autoencoder
    it would by whole levels, the last of which holds more than half of a decoder's activations: there it is the blocks
    that its decoder's levels are built of (ours).

    Args:
        within: Where a block runs again.

    Returns:
        False: it does already, or cannot (Qwen-Image's autoencoders, whose blocks count how often they ran).
    """
    if recomputes(network) or not network._supports_gradient_checkpointing:
        return False

    def again(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The networks are frozen and draw nothing, and reading a generator's state would wait for the device.
        return checkpoint(
            block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), within()),
            **kwargs,
        )  # fmt: skip

    if type(network).__name__ in MISCALLED:
        blocks = [block for block in network.modules() if type(block).__name__ in network._repeated_blocks]
    else:
        blocks = list(_blocks(network.decoder)) if hasattr(network, "decoder") else []
    for block in blocks:
        block.forward = partial(again, block.forward)
    if not blocks:
        network.enable_gradient_checkpointing(again)
    network.is_recomputed = True
    return True


def recomputes(network: Any) -> bool:
    """Whether it does."""
    return getattr(network, "is_recomputed", False)


def _blocks(decoder: nn.Module) -> Iterator[nn.Module]:
    """What diffusers builds the levels of its decoders of."""
    for level in decoder.modules():
        for name in ("resnets", "attentions", "upsamplers"):
            yield from (block for block in getattr(level, name, None) or () if block is not None)
