"""What holds an embedding among those of real images: their Gaussian, and their nearest neighbours.

Legend: B rows, E embedding width, K neighbours, M rows of the bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from index.reference import Reference


@dataclass(frozen=True)
class Whitening:
    """A Gaussian of image embeddings, ready for float32 work on the device: R = |(z - mean) W'|^2 / E, W = L^-1."""

    mean_E: torch.Tensor
    inverse_EE: torch.Tensor
    cholesky_EE: torch.Tensor

    @staticmethod
    def of(mean_E: torch.Tensor, cholesky_EE: torch.Tensor, device: torch.device | str = "cpu") -> Whitening:
        """From the mean and the lower Cholesky factor; inverted in float64."""
        eye_EE = torch.eye(len(mean_E), dtype=torch.float64)
        inverse_EE = torch.linalg.solve_triangular(cholesky_EE.detach().double().cpu(), eye_EE, upper=False)
        return Whitening(*(m.float().to(device) for m in (mean_E, inverse_EE, cholesky_EE)))

    def distance(self, z_BE: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distance over E, (B,): 1 on average for embeddings that follow the Gaussian."""
        return ((z_BE - self.mean_E) @ self.inverse_EE.mT).square().mean(-1)


class Search(Protocol):
    """z_BE -> unit-norm neighbours_BKE, nearest first. `on_device`: pure tensor work, which a step may capture."""

    on_device: bool

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor: ...


class ExactSearch:
    """The k nearest rows of a bank in device memory, by cosine: a matrix product, which a step can capture.

    Args:
        bank_ME: Embeddings, any norm.
        k: Neighbours a query.
    """

    on_device = True

    def __init__(self, bank_ME: torch.Tensor, k: int) -> None:
        if not 1 <= k <= len(bank_ME):
            raise ValueError(f"k is {k}, the bank has {len(bank_ME)} rows")
        self.bank_ME = nn.functional.normalize(bank_ME.float(), dim=-1)
        self.k = k

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor:
        nearest_BK = (nn.functional.normalize(z_BE, dim=-1) @ self.bank_ME.mT).topk(self.k, dim=1).indices
        return self.bank_ME[nearest_BK]


class ReferenceSearch:
    """Neighbours by the reference's index: as large as the index may be, outside the device's graph."""

    on_device = False

    def __init__(self, reference: Reference, k: int) -> None:
        self.reference, self.k = reference, k

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor:
        positions_BK = self.reference.positions(z_BE, self.k)
        vectors_BKE = torch.from_numpy(self.reference.index.gather(positions_BK)).to(z_BE)
        return nn.functional.normalize(vectors_BKE, dim=-1)


def open_search(reference: Reference, k: int, device: str) -> Search:
    """Exact search on a GPU where the bank fits into a quarter of its free memory, else the reference's index.

    Raises:
        ValueError: The reference has fewer than k rows.
    """
    require_rows(reference, k)
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if reference.rows * reference.dim * 4 <= free // 4:
            return ExactSearch(torch.from_numpy(np.array(reference.index.vectors_NE)).to(device), k)
    return ReferenceSearch(reference, k)


def require_rows(reference: Reference, k: int) -> None:
    """Raises ValueError where a reference has fewer than k rows."""
    if k > reference.rows:
        raise ValueError(f"k is {k}, the reference has {reference.rows} rows: lower k, or use a larger reference")
