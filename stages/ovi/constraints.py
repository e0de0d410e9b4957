"""What holds an embedding among those of real images: their Gaussian, and their nearest neighbours.

Legend: B rows, E embedding width, K neighbours, M rows of the bank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn

from stages.engine.device import free_bytes

if TYPE_CHECKING:
    from index.captions import Captions
    from index.reference import Reference


@dataclass(frozen=True)
class Whitening:
    """A Gaussian of image embeddings, ready for float32 work on the device: R = |(z - centre) W'|^2 / E, W = L^-1.

    Attributes:
        own_centre: Raw text embeddings (B, E) -> where each one's Gaussian has its mean; None: all in `mean_E`.
    """

    mean_E: torch.Tensor
    inverse_EE: torch.Tensor
    cholesky_EE: torch.Tensor
    own_centre: Callable[[torch.Tensor], torch.Tensor] | None = None

    @staticmethod
    def of(
        mean_E: torch.Tensor, cholesky_EE: torch.Tensor, device: torch.device | str = "cpu",
        own_centre: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Whitening:  # fmt: skip
        """From the mean and the lower Cholesky factor; inverted in float64."""
        eye_EE = torch.eye(len(mean_E), dtype=torch.float64)
        inverse_EE = torch.linalg.solve_triangular(cholesky_EE.detach().double().cpu(), eye_EE, upper=False)
        mean_E, inverse_EE, cholesky_EE = (m.float().to(device) for m in (mean_E, inverse_EE, cholesky_EE))
        return Whitening(mean_E, inverse_EE, cholesky_EE, own_centre)

    def centres(self, t_BE: torch.Tensor) -> torch.Tensor:
        """The means (B, E) of the Gaussians of some raw texts."""
        if self.own_centre is None:
            return self.mean_E.expand(len(t_BE), -1)
        return self.own_centre(t_BE.cpu()).to(self.mean_E)

    def distance(self, z_BE: torch.Tensor, centre_BE: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distance over E, (B,): 1 on average for embeddings that follow the Gaussian."""
        return ((z_BE - centre_BE) @ self.inverse_EE.mT).square().mean(-1)

    def balance(self, t_BE: torch.Tensor, centre_BE: torch.Tensor) -> torch.Tensor:
        """The weights (B,) at which the distance holds the pull of a text of unit norm at 1 (ours).

        With g the gradient of cos(z, t) at the centre, for z as long as images are, 1 - cos + w R is least where
        R = E |L' g|^2 / (4 w^2), as long as the pull stays what it is there: 1 for w = sqrt(E) |L' g| / 2.
        """
        norm_B = (centre_BE.square().sum(-1) + self.cholesky_EE.square().sum()).sqrt()
        unit_BE = nn.functional.normalize(centre_BE, dim=-1)
        pull_BE = (t_BE - (t_BE * unit_BE).sum(-1, keepdim=True) * unit_BE) / norm_B[:, None]
        return (pull_BE @ self.cholesky_EE).norm(dim=-1) * len(self.mean_E) ** 0.5 / 2


def floored(covariance_EE: torch.Tensor, floor: float) -> torch.Tensor:
    """The lower Cholesky factor (E, E) of a covariance whose variances are at least a share of their mean."""
    variance_E, axes_EE = torch.linalg.eigh(covariance_EE.double())
    kept_E = variance_E.clamp_min(floor * float(variance_E.mean()))
    return torch.linalg.cholesky((axes_EE * kept_E) @ axes_EE.mT)


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


class CaptionSearch:
    """The pictures with the k captions that are nearest to a text."""

    on_device = False

    def __init__(self, reference: Reference, captions: Captions, k: int) -> None:
        self.reference, self.captions, self.k = reference, captions, k

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor:
        images_BKE = nearest_pairs(self.reference, self.captions, z_BE, self.k)[1]
        return nn.functional.normalize(images_BKE, dim=-1).to(z_BE)


def nearest_pairs(
    reference: Reference, captions: Captions, t_BT: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k captions nearest to each text, raw, (B, K, T), and their pictures' embeddings (B, K, E); float64."""
    found_BK = captions.index.search(t_BT.detach().float().cpu().numpy(), k)[1]
    texts_BKT = torch.from_numpy(captions.index.gather(found_BK)).double()
    return texts_BKT, torch.from_numpy(reference.index.gather(captions.rows_M[found_BK])).double()


def open_search(reference: Reference, k: int, device: str) -> Search:
    """Exact search on a GPU where the bank fits into a quarter of its free memory, else the reference's index.

    Raises:
        ValueError: The reference has fewer than k rows.
    """
    require_rows(reference, k)
    free = free_bytes(torch.device(device))
    if free is not None and reference.rows * reference.dim * 4 <= free // 4:
        return ExactSearch(torch.from_numpy(np.array(reference.index.vectors_NE)).to(device), k)
    return ReferenceSearch(reference, k)


def require_rows(reference: Reference, k: int) -> None:
    """Raises ValueError where a reference has fewer than k rows."""
    if k > reference.rows:
        raise ValueError(f"k is {k}, the reference has {reference.rows} rows: lower k, or use a larger reference")
