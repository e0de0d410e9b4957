"""What a shard of inverted prompts leaves beside its record: time and occupancy a method, moments of its embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from index.gaussian import Accumulator
from stages.engine.solver import Occupancy

SPENT = ("rows", "failed", "seconds", "decode_seconds")
TOTALS = (*SPENT, "slot_steps", "busy_slot_steps")
"""What the arrays ``totals.<method>`` hold, in this order."""


class Summary:
    """Filled while a shard is worked on, emptied by `take`.

    Args:
        labels: Of the methods.
        occupancy: Method label -> how full its slots were; counted by the solver.
    """

    def __init__(self, labels: Iterable[str], occupancy: dict[str, Occupancy]) -> None:
        self._labels, self._occupancy = tuple(labels), occupancy
        self._start()

    def _start(self) -> None:
        self._totals = {label: dict.fromkeys(SPENT, 0.0) for label in self._labels}
        self._accumulators: dict[str, Accumulator] = {}
        self._occupancy.clear()

    def add(self, label: str, what: str, amount: float) -> None:
        """More of what is in `SPENT`."""
        self._totals[label][what] += amount

    def observe(self, name: str, embeddings: Sequence[np.ndarray]) -> None:
        """Embeddings (E,) whose moments are kept under a name."""
        if embeddings:
            self._accumulators.setdefault(name, Accumulator(len(embeddings[0]))).add(np.stack(embeddings))

    def take(self) -> dict[str, np.ndarray]:
        """``totals.<method>``: `TOTALS`; ``moments.<name>.<part>``: as of `index.gaussian.Moments.to_arrays`.

        Starts the next shard's.
        """
        summary = {}
        for label, totals in self._totals.items():
            occupancy = self._occupancy.get(label, Occupancy())
            summary[f"totals.{label}"] = np.array(
                [*totals.values(), occupancy.slot_steps, occupancy.busy_slot_steps], np.float64
            )
        for name, accumulator in self._accumulators.items():
            arrays = accumulator.moments().to_arrays()
            summary |= {f"moments.{name}.{part}": array for part, array in arrays.items()}
        self._start()
        return summary
