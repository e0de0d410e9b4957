"""How many rows the device takes at once: told beforehand by its free memory, and learned where it ran out.

A network that runs out of memory on a batch is given it in halves, and from then on no larger part than goes through;
where not one row does, something that costs time has to be done for it.
Whoever owns the `Room` keeps that: a model for its whole life, so that no later shard runs out again; and the runtime
tells the other workers of a run (`pipeline.contract.Lessons`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from pipeline.contract import Fit, Fits, halvings
from stages.engine.device import device_kind

T = TypeVar("T")
ANY = 1 << 30
"""More rows than there are: nothing is known."""


@dataclass
class Room:
    """Of one kind of work.

    Attributes:
        rows: Most at once; it falls, and never rises.
        relief: Makes a row take less, where one alone does not fit. False: nothing is left to be done.
        ran_out: `rows` is what running out of memory taught, here or elsewhere.
        relieved: How often relief was had because one row alone had not fitted.
    """

    rows: int = ANY
    relief: Callable[[], bool] = lambda: False
    ran_out: bool = False
    relieved: int = 0

    @property
    def fit(self) -> Fit | None:
        """What running out has taught; None: nothing has."""
        return Fit(self.rows, self.relieved) if self.ran_out else None

    def heed(self, fit: Fit) -> None:
        """Take no more at once than went through elsewhere."""
        self.rows, self.ran_out = min(self.rows, fit.rows), True
        while self.relieved < fit.relieved and self.relieve():
            pass

    def halve(self, rows: int) -> bool:
        """From now on take half of what ran out. False: it was one row."""
        if rows > 1:
            self.rows, self.ran_out = min(self.rows, rows // 2), True
        return rows > 1

    def relieve(self) -> bool:
        """Make a row take less, since one alone does not fit. False: nothing is left to be done."""
        if not self.relief():
            return False
        self.rows, self.ran_out, self.relieved = 1, True, self.relieved + 1
        return True

    def parts(self, rows: int, work: Callable[[slice], T], most: int = ANY) -> Iterator[T]:
        """What `work` makes of rows 0 to `rows`, in parts that fit, of so many rows at most.

        Raises:
            torch.OutOfMemoryError: One row alone does not fit, and cannot be made to.
        """
        start = 0
        while start < rows:
            part = slice(start, min(rows, start + self.rows, start + most))
            result = self._tried(part, work)
            if result is not None:
                start = part.stop
                yield result

    def _tried(self, part: slice, work: Callable[[slice], T]) -> T | None:
        """None: the part does not fit."""
        count = part.stop - part.start
        try:
            return work(part)
        except torch.OutOfMemoryError:
            if not self.halve(count) and not self.relieve():
                raise
        # Not before here: the error holds on to what the failed call had allocated.
        halvings.count()
        release()
        return None

    def __call__(self, network: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        """What a network gives for a batch, whose tensors, plain or in mappings, have B first.

        Under gradients that lead back into the batch it is run as a whole: its parts would all be kept for the way
        back, and whoever takes the gradient has to divide the rows.
        """
        tensors = list(_tensors(given))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return network(*given)
        rows = len(tensors[0])
        made = list(self.parts(rows, lambda part: network(*(_cut(one, part, rows) for one in given))))
        return made[0] if len(made) == 1 else torch.cat(made)


class Rooms(dict[str, Room]):
    """Rooms by kind of work, made when they are first asked for.

    Args:
        device: What runs out.
        told: How many rows of a kind of work fit, as far as can be told beforehand.
        relief: Makes a row of a kind of work take less (`Room`).
    """

    def __init__(
        self, device: torch.device | str, told: Callable[[str], int] = lambda work: ANY,
        relief: Callable[[str], bool] = lambda work: False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.told, self.relief = told, relief
        self._on = f" on {device_kind(torch.device(device))}"

    def __missing__(self, work: str) -> Room:
        return self.setdefault(work, Room(self.told(work), partial(self.relief, work)))  # threads may ask at a time

    def learned(self) -> dict[str, Fit]:
        """See `pipeline.contract.Lessons`."""
        return {work + self._on: room.fit for work, room in list(self.items()) if room.fit is not None}

    def heed(self, fits: Fits) -> None:
        """See `pipeline.contract.Lessons`."""
        for name, fit in fits.items():
            if name.endswith(self._on):
                self[name.removesuffix(self._on)].heed(fit)


def release() -> None:
    """Give back what the allocator holds and nobody uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    for one in given:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, Mapping):
            yield from _tensors(one.values())


def _cut(one: Any, part: slice, rows: int) -> Any:
    if part == slice(0, rows):
        return one
    return one[part] if isinstance(one, torch.Tensor) else {name: value[part] for name, value in one.items()}
