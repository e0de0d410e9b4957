"""Gaussian statistics of embeddings: one pass, float64, mergeable, removable.

Tensor legend: N rows, E embedding width, T = E (E + 1) / 2 entries of a packed lower triangle, B query rows.

`Moments` is what a shard leaves behind: weight sums, the mean, and sums of powers of the deviations from that mean,
up to the fourth, as far as Ledoit-Wolf's estimator needs them. Moving all of it to another centre is exact algebra,
so merging (Chan, Golub and LeVeque, 1979, for the second order; the higher orders are ours), and taking a shard out
again, need no second pass. `Gaussian` is the shrunk distribution that comes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline import record

if TYPE_CHECKING:
    import torch

Shrinkage = float | Literal["ledoit-wolf"]

BLOCK_ROWS = 4096  # a float64 block of 1280 columns takes 42 MB; shorter products run below full speed


@dataclass(frozen=True)
class Moments:
    """Mergeable sums over weighted rows ``x``, with ``u = x - mean``; everything in float64.

    Attributes:
        rows: Number of rows.
        weight: Sum of the weights ``w`` (the number of rows when none were given).
        weight_square: Sum of ``w**2``.
        norm: Sum of ``w |x|``.
        mean_E: Weighted mean.
        scatter_EE: Sum of ``w u u'``.
        cubic_E: Sum of ``w |u|^2 u``.
        quartic: Sum of ``w |u|^4``.
    """

    rows: int
    weight: float
    weight_square: float
    norm: float
    mean_E: np.ndarray
    scatter_EE: np.ndarray
    cubic_E: np.ndarray
    quartic: float

    @property
    def dim(self) -> int:
        return len(self.mean_E)

    @property
    def mean_norm(self) -> float:
        """Weighted mean of the rows' Euclidean norms."""
        return self.norm / self.weight

    def covariance(self) -> np.ndarray:
        """Unbiased covariance (E, E): what ``numpy.cov(x, aweights=w)`` gives.

        Raises:
            ValueError: With fewer than two rows.
        """
        if self.rows < 2:
            raise ValueError(f"a covariance needs at least 2 rows, there are {self.rows}")
        return self.scatter_EE / (self.weight - self.weight_square / self.weight)

    def ledoit_wolf(self) -> float:
        """Shrinkage intensity towards the scaled identity (Ledoit and Wolf, 2004, lemma 3.2 to 3.4), in [0, 1].

        Weighted rows count as ``weight**2 / weight_square`` independent ones (ours).
        """
        s_EE = self.scatter_EE / self.weight
        square = float(np.vdot(s_EE, s_EE))
        distance = square - float(np.trace(s_EE)) ** 2 / self.dim
        error = (self.quartic / self.weight - square) * self.weight_square / self.weight**2
        return min(1.0, max(0.0, error / distance)) if distance > 0 else 1.0

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As plain float64 arrays; the scatter as its packed lower triangle (T,)."""
        scalars = [self.rows, self.weight, self.weight_square, self.norm, self.quartic]
        return {
            "scalars": np.array(scalars, dtype=np.float64),
            "mean": self.mean_E,
            "cubic": self.cubic_E,
            "scatter": self.scatter_EE[np.tril_indices(self.dim)],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Moments:
        """The inverse of `to_arrays`."""
        rows, weight, weight_square, norm, quartic = (float(value) for value in arrays["scalars"])
        dim = len(arrays["mean"])
        scatter_EE = np.empty((dim, dim))
        lower = np.tril_indices(dim)
        scatter_EE[lower] = arrays["scatter"]
        scatter_EE.T[lower] = arrays["scatter"]
        mean_E, cubic_E = np.asarray(arrays["mean"], np.float64), np.asarray(arrays["cubic"], np.float64)
        return cls(int(rows), weight, weight_square, norm, mean_E, scatter_EE, cubic_E, quartic)


def empty(dim: int) -> Moments:
    """The moments of no rows."""
    return Moments(0, 0.0, 0.0, 0.0, np.zeros(dim), np.zeros((dim, dim)), np.zeros(dim), 0.0)


class Accumulator:
    """Moments of rows that arrive in batches, in O(E^2) memory.

    Sums are taken about the first block's mean, so that float64 loses nothing to a mean far from zero, and moved to the
    true mean at the end.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._shift_E: np.ndarray | None = None
        self._scatter_EE = np.zeros((dim, dim))
        self._sums_2E = np.zeros((2, dim))  # sum of w y, sum of w |y|^2 y, with y = x - shift
        self._scalars = np.zeros(5)  # rows, weight, weight_square, norm, quartic

    def add(self, x_NE: np.ndarray, weights_N: np.ndarray | None = None) -> None:
        """Add rows, of any float type.

        Args:
            x_NE: Rows (N, E).
            weights_N: Non-negative weights (N,); 1 each when left out.

        Raises:
            ValueError: When a shape is wrong, a value is not finite, or a weight is negative.
        """
        if x_NE.ndim != 2 or x_NE.shape[1] != self.dim:
            raise ValueError(f"rows of width {self.dim} wanted, got an array of shape {x_NE.shape}")
        if weights_N is not None and (weights_N.shape != (len(x_NE),) or not np.all(weights_N >= 0)):
            raise ValueError(f"one weight >= 0 for each of the {len(x_NE)} rows wanted")
        for start in range(0, len(x_NE), BLOCK_ROWS):
            weights = None if weights_N is None else weights_N[start : start + BLOCK_ROWS]
            self._add_block(x_NE[start : start + BLOCK_ROWS], weights)

    def _add_block(self, x_NE: np.ndarray, weights_N: np.ndarray | None) -> None:
        y_NE = x_NE.astype(np.float64)
        norm_N = np.sqrt(np.einsum("ne,ne->n", y_NE, y_NE))
        if not np.isfinite(norm_N).all():
            raise ValueError(f"row {int(np.argmin(np.isfinite(norm_N)))} of the batch is not finite")
        if self._shift_E is None:
            self._shift_E = y_NE.mean(axis=0)
        y_NE -= self._shift_E
        square_N = np.einsum("ne,ne->n", y_NE, y_NE)
        w_N = np.ones(len(y_NE)) if weights_N is None else np.asarray(weights_N, np.float64)
        self._sums_2E += np.stack([w_N, w_N * square_N]) @ y_NE
        self._scalars += [len(y_NE), w_N.sum(), w_N @ w_N, w_N @ norm_N, w_N @ square_N**2]
        if weights_N is not None:
            y_NE *= np.sqrt(w_N)[:, None]
        self._scatter_EE += y_NE.T @ y_NE  # a symmetric rank-N update: half the work of a general product

    def moments(self) -> Moments:
        """The moments of all rows added so far."""
        rows, weight, weight_square, norm, quartic = (float(value) for value in self._scalars)
        if self._shift_E is None or weight == 0:
            return replace(empty(self.dim), rows=int(rows))
        raw = _Raw(weight, self._sums_2E[0], self._scatter_EE, self._sums_2E[1], quartic)
        return _centred(raw, self._shift_E, rows=int(rows), weight_square=weight_square, norm=norm)


@dataclass(frozen=True)
class _Raw:
    """Sums of powers of ``y = x - centre`` about any centre: w, w y, w y y', w |y|^2 y, w |y|^4."""

    weight: float
    first_E: np.ndarray
    second_EE: np.ndarray
    third_E: np.ndarray
    fourth: float

    def moved(self, d_E: np.ndarray) -> _Raw:
        """The same rows about a centre that lies ``-d`` away, so that each deviation grows by ``d``."""
        w, s_E, s_EE = self.weight, self.first_E, self.second_EE
        trace, dd, sd, sd_E = float(np.trace(s_EE)), float(d_E @ d_E), float(s_E @ d_E), s_EE @ d_E
        cross_EE = np.outer(s_E, d_E)
        third_E = self.third_E + trace * d_E + 2 * sd_E + 2 * sd * d_E + dd * s_E + w * dd * d_E
        fourth = self.fourth + 4 * float(d_E @ sd_E) + w * dd**2 + 4 * float(self.third_E @ d_E)
        fourth += 2 * dd * trace + 4 * dd * sd
        second_EE = s_EE + cross_EE + cross_EE.T + w * np.outer(d_E, d_E)
        return _Raw(w, s_E + w * d_E, second_EE, third_E, fourth)


def _centred(raw: _Raw, centre_E: np.ndarray, *, rows: int, weight_square: float, norm: float) -> Moments:
    offset_E = raw.first_E / raw.weight
    about = raw.moved(-offset_E)
    mean_E = centre_E + offset_E
    return Moments(
        rows, raw.weight, weight_square, norm, mean_E, about.second_EE, about.third_E, max(about.fourth, 0.0)
    )


def _about(part: Moments, centre_E: np.ndarray) -> _Raw:
    raw = _Raw(part.weight, np.zeros(part.dim), part.scatter_EE, part.cubic_E, part.quartic)
    return raw.moved(part.mean_E - centre_E)


def moments(x_NE: np.ndarray, weights_N: np.ndarray | None = None) -> Moments:
    """Moments of an array of rows (N, E), optionally weighted (N,)."""
    accumulator = Accumulator(x_NE.shape[1])
    accumulator.add(x_NE, weights_N)
    return accumulator.moments()


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts' rows together.

    Args:
        parts: In a fixed order (shard order), so that the last bits are the same every time.

    Raises:
        ValueError: When there are none, or their widths differ.
    """
    total: Moments | None = None
    for part in parts:
        total = part if total is None else _combined(total, part, sign=1)
    if total is None:
        raise ValueError("no moments to merge")
    return total


def remove(total: Moments, part: Moments) -> Moments:
    """Moments of the rows of ``total`` that are not in ``part``, which must have been merged into it."""
    if part.rows > total.rows:
        raise ValueError(f"cannot take {part.rows} rows out of {total.rows}")
    if part.rows == total.rows:
        return empty(total.dim)
    return _combined(total, part, sign=-1)


def _combined(a: Moments, b: Moments, sign: Literal[1, -1]) -> Moments:
    if a.dim != b.dim:
        raise ValueError(f"embeddings of width {a.dim} and {b.dim} cannot be merged")
    if b.weight == 0:
        return replace(a, rows=a.rows + sign * b.rows)
    if a.weight == 0:
        return replace(b, rows=a.rows + b.rows)
    weight = a.weight + sign * b.weight
    mean_E = a.mean_E + (b.mean_E - a.mean_E) * (sign * b.weight / weight)
    raw_a, raw_b = _about(a, mean_E), _about(b, mean_E)
    return Moments(
        rows=a.rows + sign * b.rows,
        weight=weight,
        weight_square=a.weight_square + sign * b.weight_square,
        norm=a.norm + sign * b.norm,
        mean_E=mean_E,
        scatter_EE=raw_a.second_EE + sign * raw_b.second_EE,
        cubic_E=raw_a.third_E + sign * raw_b.third_E,
        quartic=max(raw_a.fourth + sign * raw_b.fourth, 0.0),
    )


@dataclass(frozen=True)
class Gaussian:
    """A multivariate normal with a shrunk covariance, in float64.

    Queries are torch tensors; each method works in their dtype and on their device, and lets gradients through.

    Attributes:
        mean_E: Mean.
        covariance_EE: ``(1 - a) S + a tr(S) / E I``, with S the sample covariance and a the shrinkage.
        cholesky_EE: Its lower Cholesky factor.
        shrinkage: The intensity a that was used, in [0, 1].
        rows: Rows that the statistics rest on.
        mean_norm: Mean Euclidean norm of those rows.
    """

    mean_E: torch.Tensor
    covariance_EE: torch.Tensor
    cholesky_EE: torch.Tensor
    shrinkage: float
    rows: int
    mean_norm: float

    @property
    def dim(self) -> int:
        return len(self.mean_E)

    def whiten(self, z_BE: torch.Tensor) -> torch.Tensor:
        """``L^-1 (z - mean)`` (B, E): standard normal where z follows this distribution."""
        import torch

        centred_BE = z_BE - self.mean_E.to(z_BE)
        return torch.linalg.solve_triangular(self.cholesky_EE.to(z_BE), centred_BE.mT, upper=False).mT

    def mahalanobis(self, z_BE: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances (B,), ``(z - mean)' C^-1 (z - mean)``: E on average for rows that follow it."""
        return self.whiten(z_BE).square().sum(-1)

    def log_density(self, z_BE: torch.Tensor) -> torch.Tensor:
        """Natural logarithm of the density (B,)."""
        log_det = 2 * self.cholesky_EE.diagonal().log().sum().item()
        return -0.5 * (self.mahalanobis(z_BE) + log_det + self.dim * float(np.log(2 * np.pi)))

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """Draws (n, E) in float64 that depend on the seed alone."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        white_NE = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.mean_E.cpu() + white_NE @ self.cholesky_EE.cpu().mT

    def frechet(self, other: Gaussian) -> float:
        """Squared Frechet distance to another normal (Dowson and Landau, 1982): what FID reports.

        ``tr (C1 C2)^(1/2)`` is the sum of the singular values of ``L1' L2``, which needs no matrix square root.
        """
        import torch

        shift = (self.mean_E - other.mean_E).square().sum()
        overlap = torch.linalg.svdvals(self.cholesky_EE.mT @ other.cholesky_EE).sum()
        return max(0.0, float(shift + self.covariance_EE.trace() + other.covariance_EE.trace() - 2 * overlap))


def fit(statistics: Moments, shrinkage: Shrinkage = "ledoit-wolf") -> Gaussian:
    """The Gaussian of some moments.

    Args:
        statistics: Of at least two rows.
        shrinkage: Fixed intensity in [0, 1], or ``"ledoit-wolf"``.

    Raises:
        ValueError: When the shrunk covariance is not positive definite.
    """
    import torch

    intensity = statistics.ledoit_wolf() if shrinkage == "ledoit-wolf" else float(shrinkage)
    if not 0 <= intensity <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1] or be 'ledoit-wolf', got {shrinkage!r}")
    covariance_EE = torch.from_numpy(statistics.covariance())
    scale = covariance_EE.trace() / statistics.dim
    covariance_EE = (1 - intensity) * covariance_EE + intensity * scale * torch.eye(statistics.dim, dtype=torch.float64)
    cholesky_EE, info = torch.linalg.cholesky_ex(covariance_EE)
    if int(info) != 0:
        raise ValueError(
            f"the covariance of {statistics.rows} rows of width {statistics.dim} is singular at shrinkage "
            f"{intensity:g}: use 'ledoit-wolf' or a larger fixed shrinkage, or more rows"
        )
    mean_E = torch.from_numpy(statistics.mean_E)
    return Gaussian(mean_E, covariance_EE, cholesky_EE, intensity, statistics.rows, statistics.mean_norm)


def save(path: Path, statistics: Moments, gaussian: Gaussian, facts: Mapping[str, Any]) -> None:
    """Write ``<path>.safetensors`` (the moments, and the Gaussian's covariance and factor) and ``<path>.json``."""
    from safetensors.numpy import save_file

    arrays = {f"moments.{name}": np.ascontiguousarray(array) for name, array in statistics.to_arrays().items()}
    arrays["covariance"] = gaussian.covariance_EE.numpy()
    arrays["cholesky"] = gaussian.cholesky_EE.contiguous().numpy()
    draft = path.with_suffix(".safetensors.tmp")
    save_file(arrays, draft)
    draft.replace(path.with_suffix(".safetensors"))
    described = {
        "rows": statistics.rows,
        "weight": statistics.weight,
        "dim": statistics.dim,
        "mean_norm": statistics.mean_norm,
        "shrinkage": gaussian.shrinkage,
        "ledoit_wolf": statistics.ledoit_wolf(),
        **facts,
    }
    record.write_facts(path.with_suffix(".json"), described)


def load(path: Path) -> tuple[Gaussian, dict[str, Any]]:
    """Open what `save` wrote, memory-mapped: the Gaussian and the facts beside it."""
    from safetensors import safe_open

    facts = json.loads(path.with_suffix(".json").read_text())
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as tensors:
        mean_E, covariance_EE = tensors.get_tensor("moments.mean"), tensors.get_tensor("covariance")
        cholesky_EE = tensors.get_tensor("cholesky")
    gaussian = Gaussian(mean_E, covariance_EE, cholesky_EE, facts["shrinkage"], facts["rows"], facts["mean_norm"])
    return gaussian, facts


def load_moments(path: Path) -> Moments:
    """The mergeable moments in what `save` wrote, for adding shards to it or taking some out."""
    from safetensors.numpy import load_file

    arrays = load_file(path.with_suffix(".safetensors"))
    return Moments.from_arrays({name[8:]: array for name, array in arrays.items() if name.startswith("moments.")})
