"""What is left of inverted prompts beside their rows: what they took, and the moments of what came out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from index.gaussian import BLOCK_ROWS, Accumulator
from pipeline.contract import Row
from stages.engine.solver import Occupancy

SPENT = ("seconds", "decode_seconds", "slot_steps", "busy_slot_steps")
"""What the arrays ``spent.<method>`` hold, in this order."""
OBSERVED = {"embeddings": "embedding", "pictures": "picture_embedding"}
"""Whose moments are kept, under which names; a row's picture has one where it was scored by CLIP."""


class Spent:
    """Time and slots that the methods took, whichever rows they were for. One thread adds, others may take.

    Args:
        labels: Of the methods.
        occupancy: Method label -> how full its slots were; counted by the solver.
    """

    def __init__(self, labels: Iterable[str], occupancy: Mapping[str, Occupancy]) -> None:
        self._occupancy = occupancy
        self._seconds = {label: {"seconds": 0.0, "decode_seconds": 0.0} for label in labels}
        self._told = {label: np.zeros(len(SPENT)) for label in self._seconds}

    def add(self, label: str, what: str, seconds: float) -> None:
        """More ``seconds`` or ``decode_seconds``."""
        self._seconds[label][what] += seconds

    def take(self) -> dict[str, np.ndarray]:
        """``spent.<method>``: `SPENT`, since the last call."""
        none, taken = Occupancy(), {}
        for label, seconds in self._seconds.items():
            slots = self._occupancy.get(label, none)
            now = np.array([*seconds.values(), slots.slot_steps, slots.busy_slot_steps], np.float64)
            taken[f"spent.{label}"], self._told[label] = now - self._told[label], now
        return taken


class Moments:
    """Of what is in some rows: a `pipeline.contract.Tally`."""

    def __init__(self) -> None:
        self._unsummed: dict[str, list[np.ndarray]] = {}
        self._accumulators: dict[str, Accumulator] = {}

    def add(self, row: Row) -> None:
        if row["status"] != "ok":
            return
        for kind, column in OBSERVED.items():
            if row.get(column) is not None:
                name = f"{kind}.{row['method']}"
                held = self._unsummed.setdefault(name, [])
                held.append(row[column])
                if len(held) == BLOCK_ROWS:
                    self._sum(name)

    def _sum(self, name: str) -> None:
        z_BE = np.stack(self._unsummed.pop(name))
        self._accumulators.setdefault(name, Accumulator(z_BE.shape[1])).add(z_BE)

    def summary(self) -> dict[str, np.ndarray]:
        """``moments.<kind>.<method>.<part>``, the parts as of `index.gaussian.Moments.to_arrays`."""
        for name in list(self._unsummed):
            self._sum(name)
        return {
            f"moments.{name}.{part}": array
            for name, accumulator in self._accumulators.items()
            for part, array in accumulator.moments().to_arrays().items()
        }
