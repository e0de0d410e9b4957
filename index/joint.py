"""Joint statistics of texts and images, one pass, float64, mergeable, removable; and what the one says of the other.

Tensor legend: N rows, T width of the text embeddings, E of the image embeddings, J = T + E, B query rows.

A captioned row is one vector: its text embedding, then its image embedding. So the sums are `index.gaussian.Moments` of
width J, and merging, removing and Ledoit-Wolf are theirs. `Regression` is the conditional mean of the joint Gaussian,
E[z | t], with a ridge, and the covariance of what it leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from index import gaussian
from index.gaussian import Moments

if TYPE_CHECKING:
    import torch

RIDGES = 10.0 ** np.linspace(-6, 3, 37)
"""What generalised cross-validation chooses from, in units of the texts' mean variance."""
ROWS_A_DIRECTION = 2
"""Captioned rows for every direction of the texts that is fitted freely: fewer, and the fit is mostly noise (ours)."""
LEAST_ROWS = 10


@dataclass(frozen=True)
class Pairs:
    """Mergeable sums over captioned rows, everything in float64.

    Attributes:
        moments: Of the rows (t, z), of width J.
        texts: T.
        unit_J: Sum of t / |t| and of z / |z|, laid end to end.
        cosine: Sum of cos(t, z); 0 where the widths differ.
    """

    moments: Moments
    texts: int
    unit_J: np.ndarray
    cosine: float

    @property
    def rows(self) -> int:
        return self.moments.rows

    @property
    def images(self) -> int:
        """E."""
        return self.moments.dim - self.texts

    @property
    def mean_text_T(self) -> np.ndarray:
        return self.moments.mean_E[: self.texts]

    @property
    def mean_image_E(self) -> np.ndarray:
        return self.moments.mean_E[self.texts :]

    @property
    def gap(self) -> float | None:
        """Distance between the means of the unit text and the unit image embeddings: the modality gap of Liang et al.
        (2022, "Mind the gap"), in [0, 2]. None where the two have not one width."""
        if self.texts != self.images:
            return None
        return float(np.linalg.norm(self.unit_J[self.texts :] - self.unit_J[: self.texts]) / self.rows)

    @property
    def matched_cosine(self) -> float | None:
        """Mean cosine of a caption and its own picture; None where the two have not one width."""
        return self.cosine / self.rows if self.texts == self.images else None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As plain float64 arrays."""
        scalars = np.array([self.texts, self.cosine], np.float64)
        return {**self.moments.to_arrays(), "unit": self.unit_J, "pairs": scalars}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Pairs:
        """The inverse of `to_arrays`."""
        texts, cosine = (float(value) for value in arrays["pairs"])
        unit_J = np.asarray(arrays["unit"], np.float64)
        return cls(Moments.from_arrays(arrays), int(texts), unit_J, cosine)


class Accumulator:
    """The sums of captioned rows that arrive in batches, in O(J^2) memory."""

    def __init__(self, texts: int, images: int) -> None:
        self._texts = texts
        self._sums = gaussian.Accumulator(texts + images)
        self._unit_J = np.zeros(texts + images)
        self._cosine = 0.0

    def add(self, t_NT: np.ndarray, z_NE: np.ndarray) -> None:
        """Add the text and the image embeddings of as many rows, of any float type.

        Raises:
            ValueError: When a shape is wrong, or a value is not finite.
        """
        if len(t_NT) != len(z_NE):
            raise ValueError(f"{len(t_NT)} text embeddings and {len(z_NE)} image embeddings are no pairs")
        for start in range(0, len(t_NT), gaussian.BLOCK_ROWS):
            stop = start + gaussian.BLOCK_ROWS
            self._add_block(t_NT[start:stop].astype(np.float64), z_NE[start:stop].astype(np.float64))

    def _add_block(self, t_NT: np.ndarray, z_NE: np.ndarray) -> None:
        self._sums.add(np.concatenate([t_NT, z_NE], axis=1))
        unit_NT, unit_NE = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (t_NT, z_NE))
        self._unit_J += np.concatenate([unit_NT.sum(0), unit_NE.sum(0)])
        if unit_NT.shape == unit_NE.shape:
            self._cosine += float(np.vdot(unit_NT, unit_NE))

    def pairs(self) -> Pairs:
        """The sums of all rows added so far."""
        return Pairs(self._sums.moments(), self._texts, self._unit_J.copy(), self._cosine)


def merge(parts: Iterable[Pairs]) -> Pairs:
    """Sums of all parts' rows together.

    Args:
        parts: In a fixed order (shard order), so that the last bits are the same every time.

    Raises:
        ValueError: When there are none, or their widths differ.
    """
    total: Pairs | None = None
    for part in parts:
        if total is None:
            total = part
            continue
        if (part.texts, part.images) != (total.texts, total.images):
            raise ValueError("pairs of texts and images of other widths cannot be merged")
        moments = gaussian.merge([total.moments, part.moments])
        total = replace(
            total, moments=moments, unit_J=total.unit_J + part.unit_J, cosine=total.cosine + part.cosine
        )  # fmt: skip
    if total is None:
        raise ValueError("no pairs to merge")
    return total


def remove(total: Pairs, part: Pairs) -> Pairs:
    """Sums of the rows of ``total`` that are not in ``part``, which must have been merged into it."""
    moments = gaussian.remove(total.moments, part.moments)
    return replace(total, moments=moments, unit_J=total.unit_J - part.unit_J, cosine=total.cosine - part.cosine)


class TooFewRows(ValueError):
    """There are too few captioned rows for what is to be fitted."""


@dataclass(frozen=True)
class Fit:
    """The joint Gaussian, ready to be conditioned on texts under any ridge.

    Attributes:
        rows: Captioned rows.
        spectrum_T: Eigenvalues of the texts' covariance.
        axes_TT: Their eigenvectors, in columns.
        cross_ET: Covariance of the images with the texts along these axes.
        images_EE: Covariance of the images.
    """

    rows: int
    mean_text_T: np.ndarray
    mean_image_E: np.ndarray
    spectrum_T: np.ndarray
    axes_TT: np.ndarray
    cross_ET: np.ndarray
    images_EE: np.ndarray

    @staticmethod
    def of(pairs: Pairs) -> Fit:
        """Of the sums of captioned rows.

        Raises:
            TooFewRows: There are fewer than `LEAST_ROWS`.
        """
        if pairs.rows < LEAST_ROWS:
            raise TooFewRows(f"there are {pairs.rows} captioned rows, at least {LEAST_ROWS} are needed")
        covariance_JJ, t = pairs.moments.covariance(), pairs.texts
        spectrum_T, axes_TT = np.linalg.eigh(covariance_JJ[:t, :t])
        return Fit(
            pairs.rows, pairs.mean_text_T, pairs.mean_image_E, np.maximum(spectrum_T, 0), axes_TT,
            covariance_JJ[t:, :t] @ axes_TT, covariance_JJ[t:, t:],
        )  # fmt: skip

    @property
    def _unit(self) -> float:
        """What a ridge is measured in: the texts' mean variance."""
        return float(self.spectrum_T.mean()) or 1.0

    def freedom(self, ridge: float) -> float:
        """Effective number of directions of the texts that are fitted under a ridge, in [0, T]."""
        return float((self.spectrum_T / (self.spectrum_T + ridge * self._unit)).sum())

    def _is_carried(self, ridge: float) -> bool:
        return self.rows - 1 >= ROWS_A_DIRECTION * self.freedom(ridge)

    @cached_property
    def ridge(self) -> float:
        """The ridge that generalised cross-validation chooses (Golub, Heath and Wahba, 1979), of those for which there
        are rows enough; in units of the texts' mean variance."""
        return min((float(ridge) for ridge in RIDGES if self._is_carried(ridge)), key=self.score)

    def score(self, ridge: float) -> float:
        """What generalised cross-validation expects of a ridge: squared distance of an image to its text's mean."""
        damped_T = self.spectrum_T + ridge * self._unit
        explained_T = self._power_T * (2 / damped_T - self.spectrum_T / damped_T**2)
        left = float(np.trace(self.images_EE)) - float(explained_T.sum())
        return left / (1 - (1 + self.freedom(ridge)) / self.rows) ** 2

    @cached_property
    def _power_T(self) -> np.ndarray:
        return np.asarray(np.square(self.cross_ET).sum(0))

    def under(self, ridge: float | None = None) -> Regression:
        """The conditional mean of images given texts.

        Args:
            ridge: In units of the texts' mean variance; None: `ridge`.

        Raises:
            TooFewRows: The ridge is too small for so few rows.
        """
        chosen = self.ridge if ridge is None else ridge
        if not self._is_carried(chosen):
            needed = int(np.ceil(ROWS_A_DIRECTION * self.freedom(chosen))) + 1
            enough = next(float(r) for r in RIDGES if r > chosen and self._is_carried(float(r)))
            raise TooFewRows(
                f"{self.rows} captioned rows are too few for a ridge of {chosen:g}: it takes {needed} or more, or a "
                f"ridge of {enough:.1g} (left out, it is chosen by cross-validation: {self.ridge:.1g})"
            )
        damped_T = self.spectrum_T + chosen * self._unit
        weights_ET = self.cross_ET / damped_T
        explained_EE = weights_ET @ self.cross_ET.T
        left_EE = self.images_EE - explained_EE - explained_EE.T + (weights_ET * self.spectrum_T) @ weights_ET.T
        left_EE *= (self.rows - 1) / max(self.rows - 1 - self.freedom(chosen), 1.0)
        means = _tensor(self.mean_text_T), _tensor(self.mean_image_E)
        return Regression(*means, _tensor(weights_ET @ self.axes_TT.T), _tensor(left_EE), chosen)


def _tensor(x: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


@dataclass(frozen=True)
class Regression:
    """``E[z | t] = mean_image + W (t - mean_text)``, and the covariance of z about it, in float64.

    Attributes:
        weights_ET: ``S_zt (S_tt + ridge v I)^-1``, v the mean variance of the texts.
        left_EE: Covariance of what the mean leaves over, ``(n - 1) / (n - 1 - f)`` times the sample's, f the directions
            fitted: without a ridge the conditional covariance.
        ridge: That was used.
    """

    mean_text_T: torch.Tensor
    mean_image_E: torch.Tensor
    weights_ET: torch.Tensor
    left_EE: torch.Tensor
    ridge: float

    def to(self, device: str) -> Regression:
        """The same, on a device that has float64."""
        names = ("mean_text_T", "mean_image_E", "weights_ET", "left_EE")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def __call__(self, t_BT: torch.Tensor) -> torch.Tensor:
        """Conditional means (B, E), float64, of raw text embeddings on its device."""
        return self.mean_image_E + (t_BT.double() - self.mean_text_T) @ self.weights_ET.mT

    @cached_property
    def root_EE(self) -> torch.Tensor:
        """The symmetric root of the covariance that is left: `root @ noise` has it, however few the rows."""
        import torch

        variance_E, axes_EE = torch.linalg.eigh(self.left_EE)
        return (axes_EE * variance_E.clamp_min(0).sqrt()) @ axes_EE.mT
