"""A reference: the embeddings of a dataset, opened for searching and for the inversion constraints.

Tensor legend: B query rows, E embedding width, K neighbours, N rows of the reference.

On disk, in the folder ``reference`` of the job's output::

    reference.json                         what it was made of; written last
    gaussian.safetensors, gaussian.json    statistics (`index.gaussian`)
    vectors.npy                            raw embeddings (N, E), norm kept
    rows.arrow                             id of each row, and where its other columns are: part file and row in it
    index.faiss, index.faiss.json          nearest neighbours (`index.neighbours`); on disk: index.ivfdata as well
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from index import gaussian, neighbours

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

FOLDER = "reference"
RESIDENT_SHARE = 0.25  # of the device's free memory: above it, vectors stay on disk and FAISS searches


class ReferenceMismatch(ValueError):
    """The reference was made with another encoder than the job uses."""


class Neighbours(NamedTuple):
    """Nearest rows by cosine, best first.

    Attributes:
        cos_BK: Exact cosines to the raw vectors; gradients flow to the queries.
        ids: Row ids, (B, K) array of str.
        vectors_BKE: The rows' raw embeddings, in the queries' dtype and on their device.
        positions_BK: Row numbers within the reference, int64 on the CPU.
    """

    cos_BK: torch.Tensor
    ids: np.ndarray
    vectors_BKE: torch.Tensor
    positions_BK: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Everything memory-mapped; opened by `Reference.open`.

    Attributes:
        path: Its folder.
        facts: Contents of ``reference.json``: ``encoder``, ``rows``, ``dim``, ``modality`` and more.
        gaussian: Statistics of the raw embeddings, float64, on the CPU.
        index: The nearest-neighbour index over the same rows.
        device: Where queries live; on a GPU the vectors are kept there too when they fit, and searched exactly.
    """

    path: Path
    facts: Mapping[str, Any]
    gaussian: gaussian.Gaussian
    index: neighbours.Index
    device: str

    @classmethod
    def open(cls, path: str | Path, *, encoder: Mapping[str, str] | None = None, device: str = "cpu") -> Reference:
        """Open a reference.

        Args:
            path: The job's output, or the folder ``reference`` in it.
            encoder: The image encoder that the caller uses, as its ``StageInfo.models`` describes it.
            device: Torch device of the queries to come.

        Raises:
            FileNotFoundError: When there is no finished reference at ``path``.
            ReferenceMismatch: When ``encoder`` is not the one that the reference was made with.
        """
        folder = find(path)
        facts = json.loads((folder / "reference.json").read_text())
        if encoder is not None:
            require_encoder(folder, facts["encoder"], encoder)
        statistics, _ = gaussian.load(folder / "gaussian")
        return cls(folder, facts, statistics, neighbours.Index.open(folder), device)

    @property
    def rows(self) -> int:
        return int(self.facts["rows"])

    @property
    def dim(self) -> int:
        return int(self.facts["dim"])

    @property
    def mean(self) -> torch.Tensor:
        """Mean raw embedding (E,), float64, on the CPU."""
        return self.gaussian.mean_E

    @property
    def cholesky(self) -> torch.Tensor:
        """Lower Cholesky factor (E, E) of the shrunk covariance, float64, on the CPU."""
        return self.gaussian.cholesky_EE

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of the raw embeddings."""
        return self.gaussian.mean_norm

    @cached_property
    def table(self) -> pa.Table:
        """Columns ``id``, ``part``, ``row``; one row for each vector, in the vectors' order."""
        import pyarrow as pa

        with pa.memory_map(str(self.path / "rows.arrow")) as source:
            return pa.ipc.open_file(source).read_all()

    @cached_property
    def _resident(self) -> torch.Tensor | None:
        """Unit vectors (N, E) on the GPU where they fit, else None."""
        import torch

        if torch.device(self.device).type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.rows * self.dim * 2 > RESIDENT_SHARE * free:
            return None
        unit_NE = torch.empty(self.rows, self.dim, dtype=torch.float16, device=self.device)
        for start in range(0, self.rows, neighbours.SCAN_ROWS):
            block_NE = torch.from_numpy(neighbours.unit(self.index.vectors_NE[start : start + neighbours.SCAN_ROWS]))
            unit_NE[start : start + len(block_NE)] = block_NE.to(self.device)
        return unit_NE

    def whiten(self, z_BE: torch.Tensor) -> torch.Tensor:
        """``L^-1 (z - mean)`` (B, E), in z's dtype and on its device; differentiable."""
        return self.gaussian.whiten(z_BE)

    def mahalanobis(self, z_BE: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances (B,) of raw embeddings, about E for typical ones; differentiable.

        A loop that calls this thousands of times moves ``mean`` and ``cholesky`` to its device once instead.
        """
        return self.gaussian.mahalanobis(z_BE)

    def positions(self, z_BE: torch.Tensor, k: int) -> np.ndarray:
        """Row numbers (B, k) of the nearest rows by cosine, best first."""
        unit_NE = self._resident
        if unit_NE is None:
            return self.index.search(z_BE.detach().float().cpu().numpy(), k)[1]
        import torch

        q_BE = torch.nn.functional.normalize(z_BE.detach().float(), dim=-1).to(unit_NE)
        return (q_BE @ unit_NE.mT).topk(k, dim=-1).indices.cpu().numpy()

    def neighbours(self, z_BE: torch.Tensor, k: int) -> Neighbours:
        """The k nearest rows of each query by cosine.

        Args:
            z_BE: Queries (B, E), on any device, of any norm.
            k: How many, at most the reference's rows.
        """
        import torch

        positions_BK = self.positions(z_BE, k)
        vectors_BKE = torch.from_numpy(self.index.gather(positions_BK)).to(z_BE)
        cos_BK = torch.nn.functional.cosine_similarity(z_BE[:, None], vectors_BKE, dim=-1)
        return Neighbours(cos_BK, self.ids(positions_BK), vectors_BKE, positions_BK)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Ids of rows by their numbers, an array of str of the same shape."""
        taken = self.table["id"].take(positions.ravel())
        return taken.to_numpy(zero_copy_only=False).reshape(positions.shape)


def find(path: str | Path) -> Path:
    """The reference folder at a path that names it, or the output that holds it."""
    for folder in (Path(path), Path(path) / FOLDER):
        if (folder / "reference.json").exists():
            return folder
    raise FileNotFoundError(
        f"no finished reference at {path}: run `latentmill run` on a job file with `job: reference` to make one"
    )


def require_encoder(folder: Path, made_with: Mapping[str, str], asked_for: Mapping[str, str]) -> None:
    """Raise `ReferenceMismatch` unless both descriptions are of the same weights."""
    if made_with["fingerprint"] != asked_for["fingerprint"]:
        raise ReferenceMismatch(
            f"the reference {folder} was made with the image encoder {made_with['path']} "
            f"(fingerprint {made_with['fingerprint']}), but this job encodes with {asked_for['path']} "
            f"({asked_for['fingerprint']}): embeddings of different encoders cannot be compared; "
            "use the reference's encoder, or make a reference with this one"
        )
