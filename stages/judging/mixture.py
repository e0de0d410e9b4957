"""Which pictures a classifier is trained on: the real ones, and as many of each corpus.

Legend: N real pictures, K of a corpus, A added ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.judging.sets import Label, PictureSet


@dataclass(frozen=True)
class Mixture:
    """A training set, put together of two sets of pictures.

    Attributes:
        first, second: The sets.
        taken: Of each of its pictures: which set it is of, and its number there, (M, 2).
    """

    first: PictureSet
    second: PictureSet
    taken_M2: np.ndarray

    def __len__(self) -> int:
        return len(self.taken_M2)

    def pictures(self, places_B: np.ndarray) -> np.ndarray:
        """x_BHWC, uint8, of some of its places."""
        x_BHWC = np.empty((len(places_B), *self.first.x_NHWC.shape[1:]), np.uint8)
        for number, one in enumerate((self.first, self.second)):
            own_B = self.taken_M2[places_B, 0] == number
            x_BHWC[own_B] = one.x_NHWC[self.taken_M2[places_B[own_B], 1]]
        return x_BHWC

    def labels(self) -> list[Label]:
        """Of each of its pictures."""
        sets = (self.first, self.second)
        return [sets[which].labels[number] for which, number in self.taken_M2.tolist()]


def repeated(count: int, wanted: int, random: np.random.Generator) -> np.ndarray:
    """Numbers below `count`, `wanted` of them: each as often as all can be, and a random choice once more."""
    whole, rest = divmod(wanted, count)
    return np.sort(np.concatenate([np.tile(np.arange(count), whole), random.permutation(count)[:rest]]))


def mix(
    real: PictureSet, corpus: PictureSet, usable: Sequence[int], added: int, random: np.random.Generator
) -> Mixture:
    """All real pictures, and `added` of a corpus.

    Args:
        corpus: `real` itself for the training without any: then real pictures are repeated.
        usable: Numbers of the corpus's pictures whose class is known.
    """
    numbers_A = np.asarray(usable, np.int64)[repeated(len(usable), added, random)]
    own_N2 = np.stack([np.zeros(len(real.ids), np.int64), np.arange(len(real.ids))], 1)
    taken_A2 = np.stack([np.ones(added, np.int64), numbers_A], 1)
    return Mixture(real, corpus, np.concatenate([own_N2, taken_A2]))
