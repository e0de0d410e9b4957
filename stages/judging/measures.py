"""How often classifiers are right, by class and by how often a class was there to learn; and how sure that is.

Legend: T trials, K classes, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from stages.judging.sets import Label

Group = Literal["never", "rare", "frequent"]
GROUPS: tuple[Group, ...] = ("never", "rare", "frequent")
DRAWS = 4000


def name_of(label: Label) -> str:
    """A class as it is written into a row."""
    return " / ".join(label)


def group_of(count: int, rare: int) -> Group:
    """Of a class of which there are so many real pictures."""
    return "never" if count == 0 else "rare" if count <= rare else "frequent"


def by_class(labels: Sequence[Label], right: Sequence[bool]) -> dict[str, tuple[int, int]]:
    """Class -> held-out pictures that were told right, and all."""
    shown, hit = Counter(labels), Counter(label for label, yes in zip(labels, right, strict=True) if yes)
    return {name_of(label): (hit[label], shown[label]) for label in sorted(shown)}


def mean_of(classes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> float | None:
    """The mean over some classes of the share told right: each counts the same, however many pictures it has."""
    shares = [hit / shown for hit, shown in (classes[name] for name in names)]
    return float(np.mean(shares)) if shares else None


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(share_TK: np.ndarray) -> Estimate:
    """The mean over trials and classes; both are drawn again in each bootstrap sample, classes and trials apart.

    Args:
        share_TK: Share told right, or the difference of two.
    """
    random = np.random.default_rng(0)
    trials, classes = share_TK.shape
    drawn = [
        share_TK[random.integers(trials, size=trials)][:, random.integers(classes, size=classes)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(share_TK.mean()), float(low), float(high))


def judgement(
    shares: Mapping[str, Mapping[str, Mapping[str, float]]], groups: Mapping[str, Group], baseline: str
) -> dict[str, dict[str, Any]]:
    """Corpus -> group -> `Estimate`, and under ``difference`` that of what it gains over the baseline, by pairs.

    Args:
        shares: Corpus -> trial -> class -> share told right. Trials that did not end are missing.
        groups: Of each class.
        baseline: The corpus that others are compared with.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, trials in shares.items():
        found[name] = {}
        for group in GROUPS:
            classes = sorted(own for own, of in groups.items() if of == group)
            if not classes or not trials:
                continue
            both = sorted(trials.keys() & shares[baseline].keys())
            found[name][group] = {"classes": len(classes), **asdict(estimate(_table(trials, sorted(trials), classes)))}
            if name != baseline and both:
                gain_TK = _table(trials, both, classes) - _table(shares[baseline], both, classes)
                found[name][group]["difference"] = asdict(estimate(gain_TK))
    return found


def _table(
    trials: Mapping[str, Mapping[str, float]], of: Sequence[str], classes: Sequence[str]
) -> np.ndarray:  # fmt: skip
    return np.array([[trials[trial][own] for own in classes] for trial in of])
