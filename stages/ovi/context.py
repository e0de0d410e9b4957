"""What the methods of prompt inversion draw on, and what a method is.

A method maps rows to rows. Rows carry `id`, `prompt` and `text` (E,), the raw text embedding. They come back with
`embedding` (E,), and where a method optimises, with `loss`, `steps`, `passes`, `stopped` and `variable`.

Legend: E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.contract import Row
from stages.engine.room import Rooms
from stages.engine.solver import Occupancy
from stages.models.vision_tower import States, halved_products, sharing
from stages.ovi.settings import PromptMethod

if TYPE_CHECKING:
    from index.captions import Captions
    from index.reference import Reference
    from stages.models.clip import TextEncoder

RowMap = Callable[[Iterable[Row]], Iterator[Row]]
"""Maps rows to rows in any order, one out for each in; rows that arrive failed pass through."""

BATCH = 512
"""Rows that the cheap methods take at once."""


def require_captions(method: PromptMethod, path: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError where a reference lacks the captions that a method rests on.

    Args:
        facts: What ``reference.json`` says.
    """
    captioned, k = (facts.get("captions") or {}).get("captioned", 0), method.needed_captions
    if k and not captioned:
        raise ValueError(
            f"method {method.label!r} needs captions, and the reference {path} has none: make one with "
            "`captions: true` or a file of captions. From its finished embeddings that takes no image encoder: "
            "`job: reference`, `given: embeddings`, its output as `input`"
        )
    if k > captioned:
        raise ValueError(f"method {method.label!r}: k is {k}, the reference {path} has {captioned} rows with captions")


@dataclass(frozen=True)
class Context:
    """Loaded once and shared by all methods of a stage.

    Attributes:
        model, revision, allow_pickle: Of the encoders (the default of `trained-prior`).
        vision: The image encoder's network; loaded when a method asks.
        text: Prompts -> text embeddings, for warm starts; a trained prior of the same folder shares its network.
        reference: Real image embeddings.
        states: Which hidden states of the image encoder OVI's rows are to have.
        occupancy: Method label -> how full its slots were.
        slots: Method label -> rows at once, of those that optimise.
        rooms: Of the device.
        alone: Nothing else needs the image encoder but methods of one precision.
    """

    model: str
    revision: str | None
    device: str
    seed: int
    vision: Callable[[], nn.Module]
    text: TextEncoder
    reference: Reference | None
    allow_pickle: bool | None = None
    states: States | None = None
    occupancy: dict[str, Occupancy] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    rooms: Rooms = field(default_factory=lambda: Rooms("cpu"))
    alone: bool = False
    _halved: dict[str, nn.Module] = field(default_factory=dict)

    def network(self, precision: str) -> nn.Module:
        """The image encoder as autocast has it in a precision; one for all methods of that precision."""
        if precision == "float32":
            return self.vision()
        if precision not in self._halved:
            own = self.vision() if self.alone else sharing(self.vision())
            self._halved[precision] = halved_products(own, getattr(torch, precision))
        return self._halved[precision]

    def need_reference(self, method: PromptMethod) -> Reference:
        if self.reference is None:
            raise ValueError(f"method {method.label!r} needs `reference:`, the output of a `job: reference`")
        return self.reference

    def need_captions(self, method: PromptMethod) -> tuple[Reference, Captions]:
        """The reference, and the captions of it.

        Raises:
            ValueError: There is no reference, it has no captions, or fewer than the method asks for.
        """
        reference = self.need_reference(method)
        require_captions(method, str(reference.path), reference.facts)
        captions = reference.captions
        assert captions is not None
        return reference, captions
