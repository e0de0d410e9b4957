"""Candidates of one class, to those that are kept and why the others are not.

Legend: N candidates, E width of their embeddings, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np

from stages.selection.settings import SelectionSettings

JITTER = 1e-6
"""Added to the kernel's diagonal: pictures that are nearly alike would make it singular."""


@dataclass(frozen=True)
class Candidates:
    """Of one class, in any order.

    Attributes:
        ids: Of each.
        z_NE: Embeddings of any norm but 0.
        score_N: Higher is better; NaN where there is none. None: nothing was scored.
        copy_of: The picture that each is a copy of, or None.
    """

    ids: Sequence[str]
    z_NE: np.ndarray
    score_N: np.ndarray | None
    copy_of: Sequence[str | None]


def choose(given: Candidates, settings: SelectionSettings) -> list[str | None]:
    """Why each candidate is dropped; None: it is kept.

    Copies and what scores too low go first, then variety chooses among the rest, beginning with the best score. Equals
    go by their ids, so the result does not depend on the order of the candidates.
    """
    why: list[str | None] = [None if own is None else f"copy of {own}" for own in given.copy_of]
    score_N = np.zeros(len(why)) if given.score_N is None else np.asarray(given.score_N, np.float64)
    for n in np.flatnonzero(np.isnan(score_N)).tolist():
        why[n] = why[n] or "no score"
    if settings.min_score is not None:
        for n in np.flatnonzero(score_N < settings.min_score).tolist():
            why[n] = why[n] or "below score"
    ranked = sorted((n for n, said in enumerate(why) if said is None), key=lambda n: (-score_N[n], given.ids[n]))
    scored = given.score_N is not None
    best = max(settings.count, ceil(settings.share * len(ranked))) if scored else len(ranked)
    for n in ranked[best:]:
        why[n] = "below score"
    ranked = ranked[:best]
    for n, said in zip(ranked, _varied([given.ids[n] for n in ranked], given.z_NE[ranked], settings), strict=True):
        why[n] = said
    return why


class Variety(Protocol):
    """What a further candidate adds."""

    gain_N: np.ndarray
    """Of each candidate, higher is better."""

    def take(self, n: int, cos_N: np.ndarray) -> None:
        """The candidate n, with these cosines to all, is kept now."""


class Farthest:
    """Farthest-point traversal (Gonzalez 1985): the distance to the nearest kept one."""

    def __init__(self, count: int) -> None:
        self.gain_N = np.full(count, np.inf)

    def take(self, n: int, cos_N: np.ndarray) -> None:
        self.gain_N = np.minimum(self.gain_N, 1 - cos_N)


class Determinant:
    """Greedy MAP of a determinantal point process by an incremental Cholesky factor (Chen et al. 2018, algorithm 1).

    The kernel ``exp(cos - 1)`` is the Gaussian one of width 1 between unit vectors (ours: a linear one is singular for
    more rows than the embedding is wide).
    """

    def __init__(self, count: int) -> None:
        self.gain_N = np.full(count, 1 + JITTER)
        self._factor_KN = np.empty((0, count))

    def take(self, n: int, cos_N: np.ndarray) -> None:
        kernel_N = np.exp(cos_N - 1)
        kernel_N[n] = 1 + JITTER
        row_N = (kernel_N - self._factor_KN[:, n] @ self._factor_KN) / np.sqrt(self.gain_N[n])
        self._factor_KN = np.vstack([self._factor_KN, row_N])
        self.gain_N = self.gain_N - row_N**2


def _varied(ids: Sequence[str], z_NE: np.ndarray, settings: SelectionSettings) -> list[str | None]:
    """Why each of the ranked candidates is dropped; None: it is kept."""
    unit_NE = z_NE.astype(np.float64)
    unit_NE /= np.linalg.norm(unit_NE, axis=1, keepdims=True)
    variety: Variety = Farthest(len(ids)) if settings.variety == "farthest" else Determinant(len(ids))
    nearest_N, whose_N = np.full(len(ids), -np.inf), np.zeros(len(ids), np.int64)
    kept_N = np.zeros(len(ids), bool)
    for _ in range(settings.count):
        open_N = ~kept_N & (nearest_N < settings.near)
        if not open_N.any():
            break
        n = int(np.argmax(np.where(open_N, variety.gain_N, -np.inf)))  # of equals the first, which scores best
        kept_N[n] = True
        cos_N = unit_NE @ unit_NE[n]
        variety.take(n, cos_N)
        whose_N[cos_N > nearest_N] = n
        nearest_N = np.maximum(nearest_N, cos_N)
    return [
        None if kept else f"too near {ids[whose]}" if nearest >= settings.near else "enough"
        for kept, nearest, whose in zip(kept_N.tolist(), nearest_N.tolist(), whose_N.tolist(), strict=True)
    ]
