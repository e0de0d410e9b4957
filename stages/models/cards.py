"""One transformer over the cards of a worker: whole blocks in the order in which they run, each on one card.

accelerate's hooks carry the activations on to the next card, forward and on the way back; the numbers are those of the
undivided network. One card computes at a time (no pipelining): more cards give room, not speed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stages.engine.device import free_bytes

DeviceMap = dict[str, str]
"""Part of a network -> the card that it lies on, as diffusers' and transformers' `from_pretrained` take it."""


def units(network: nn.Module, whole: Collection[str] = ()) -> Iterator[tuple[str, int, bool]]:
    """What may lie on different cards, in the network's order: its name, its bytes, and whether it is a block. What
    stands before the last list of blocks (embeddings, what mixes them) is none: the network itself computes with it.

    Args:
        whole: Lists of blocks whose results the network mixes.
    """
    for name, weight in network.named_parameters(recurse=False):
        yield name, weight.numel() * weight.element_size(), False
    children = list(network.named_children())
    lists = [name for name, child in children if isinstance(child, nn.ModuleList) and name not in whole]
    behind = False
    for name, child in children:
        if name in lists:
            yield from ((f"{name}.{number}", weights_of(block), True) for number, block in enumerate(child.children()))
        else:
            yield name, weights_of(child), behind
        behind = behind or name == lists[-1]


def weights_of(network: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(weight.numel() * weight.element_size() for weight in (*network.parameters(), *network.buffers()))


def shares(total: int, room: Sequence[int]) -> list[float]:
    """How many bytes each card takes of so many, so that as much room is left on one as on another (ours); a card with
    too little takes none.

    Raises:
        ValueError: They do not fit.
    """
    taking = [card for card, free in enumerate(room) if free > 0]
    while taking:
        left = (sum(room[card] for card in taking) - total) / len(taking)
        if left < 0:
            break
        if full := [card for card in taking if room[card] <= left]:
            taking = [card for card in taking if card not in full]
            continue
        return [room[card] - left if card in taking else 0.0 for card in range(len(room))]
    raise ValueError(f"{total / 1e9:.1f} GB do not fit into {', '.join(f'{free / 1e9:.1f}' for free in room)} GB")


def spread(
    network: nn.Module, cards: Sequence[str], room: Sequence[int], whole: Collection[str] = ()
) -> DeviceMap:  # fmt: skip
    """Which card each part of a network lies on: blocks on any, all else before them on the first.

    Args:
        network: Its shapes suffice (the meta device).
        room: Bytes of each card that it may take.
        whole: See `units`.

    Raises:
        ValueError: It does not fit.
    """
    parts = list(units(network, whole))
    wanted = shares(sum(size for _, size, _ in parts), room)
    found: DeviceMap = {}
    card, taken = 0, float(sum(size for _, size, is_block in parts if not is_block))
    for name, size, is_block in parts:
        # On to the next card where more than half of the block would stand over.
        while is_block and size and card < len(cards) - 1 and taken + size / 2 > wanted[card]:
            taken, card = 0.0, card + 1
        found[name] = cards[card if is_block and size else 0]
        taken += size if is_block else 0
    return found


def layout(network: nn.Module, count: int, card: int, beside: int, whole: Collection[str] = ()) -> list[int]:
    """Bytes of weights on each of so many empty cards of one size, of which the first holds some beside the network's.

    Raises:
        ValueError: They do not fit.
    """
    names = [str(number) for number in range(count)]
    lies = spread(network, names, [card - beside, *[card] * (count - 1)], whole)
    found = [beside, *[0] * (count - 1)]
    for name, size, _ in units(network, whole):
        found[names.index(lies[name])] += size
    return found


def room_on(cards: Sequence[str]) -> list[int]:
    """Bytes that nobody holds on each card; the same of all where a device does not tell."""
    return [free if (free := free_bytes(torch.device(card))) is not None else 1 << 50 for card in cards]


def dispatch(network: Any, lies: DeviceMap) -> None:
    """Bring the parts of a network to their cards, those that are not there yet; input and result lie on the first."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(network, recurse=True)  # of a reader that picked the first card at random
    dispatch_model(network, device_map=lies, main_device=next(iter(lies.values())))


def laid_out(network: nn.Module) -> Mapping[torch.device, float]:
    """The cards that a network lies on, in its order -> the share of its weights on each."""
    bytes_of: dict[torch.device, int] = {}
    for weight in network.parameters():
        bytes_of[weight.device] = bytes_of.get(weight.device, 0) + weight.numel() * weight.element_size()
    return {device: size / max(sum(bytes_of.values()), 1) for device, size in bytes_of.items()}
