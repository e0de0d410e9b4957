"""A reference: the embeddings of a dataset, opened for searching and for the inversion constraints.

Tensor legend: B query rows, E embedding width, K neighbours, N rows of the reference.

On disk, in the folder ``reference`` of the job's output::

    reference.json                         what it was made of; written last
    gaussian.safetensors, gaussian.json    statistics (`index.gaussian`)
    vectors.npy                            raw embeddings (N, E), norm kept
    rows.arrow                             id of each row, and where its other columns are: part file and row in it
    index.faiss, index.faiss.json          nearest neighbours (`index.neighbours`); on disk: index.ivfdata as well
    captions                               of a captioned one: its texts (`index.captions`)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from index import captions, gaussian, joint, neighbours
from index.copies import fetched
from pipeline import record
from pipeline.storage import Folder

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

FOLDER = "reference"
HALF_ERROR = 2**-11 + 1e-6  # of a cosine, at most, where one of two unit vectors is rounded to float16
HALF_SURPLUS, HALF_SPARE = 4, 64  # candidates from vectors in float16: so many times k, and so many more
RESIDENT_SHARE = 0.25  # of the device's free memory, for vectors or an index; above it they stay on the host


CAPTIONS_TOLD = ("captioned", "text_dim", "modality_gap", "matched_cosine")
"""What ``reference.json`` repeats of the captions."""


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
        device: Where queries live; on a GPU the vectors are kept there too when they fit, in float16, and all of them
            are compared, the nearest again in float32; where they do not fit but the index does, faiss-gpu searches it
            there.
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
    def captions(self) -> captions.Captions | None:
        """Its texts; None where it was made without captions, or no row had one."""
        told = self.facts.get("captions") or {"captioned": 0}
        return captions.Captions.open(self.path) if told["captioned"] else None

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

    @cached_property
    def _on_gpu(self) -> neighbours.Index | None:
        """The index, searched by faiss-gpu where that is installed and the index fits, else None."""
        import torch

        device = torch.device(self.device)
        if device.type != "cuda" or neighbours.gpus() == 0:
            return None
        free, _ = torch.cuda.mem_get_info(device)
        number = torch.cuda.current_device() if device.index is None else device.index
        moved = self.index.on_gpu(number, int(RESIDENT_SHARE * free))
        return None if moved is self.index else moved

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
            index = self.index
            if self._on_gpu is not None and k * index.surplus <= neighbours.GPU_MOST:
                index = self._on_gpu
            return index.search(z_BE.detach().float().cpu().numpy(), k)[1]
        return self._by_resident(unit_NE, z_BE, k)

    def _by_resident(self, unit_NE: torch.Tensor, z_BE: torch.Tensor, k: int) -> np.ndarray:
        """Rounded vectors name candidates, in float32 arithmetic (half precision puts cosines on a grid of 5e-4); the
        exact ones rank them."""
        import torch

        unit_BE = torch.nn.functional.normalize(z_BE.detach().float(), dim=-1).to(unit_NE.device)
        wanted = min(k * HALF_SURPLUS + HALF_SPARE, self.rows)
        best_BK = unit_BE.new_empty(len(unit_BE), 0)
        rows_BK = torch.empty(len(unit_BE), 0, dtype=torch.int64, device=unit_BE.device)
        for start in range(0, self.rows, neighbours.SCAN_ROWS):
            cos_BN = unit_BE @ unit_NE[start : start + neighbours.SCAN_ROWS].float().mT
            top_BK, found_BK = cos_BN.topk(min(wanted, cos_BN.shape[1]), dim=-1)
            best_BK, rows_BK = torch.cat([best_BK, top_BK], 1), torch.cat([rows_BK, found_BK + start], 1)
            best_BK, order_BK = best_BK.topk(min(wanted, best_BK.shape[1]), dim=-1)
            rows_BK = rows_BK.gather(1, order_BK)
        q_BE, cut_B = unit_BE.cpu().numpy(), best_BK[:, -1].cpu().numpy()
        exact_BK, ranked_BK = self.index.rank(q_BE, rows_BK.cpu().numpy(), k)
        unsure_B = (exact_BK[:, -1] < cut_B + HALF_ERROR) & (wanted < self.rows)  # one that was cut off may be nearer
        if unsure_B.any():
            ranked_BK[unsure_B] = neighbours.exact(q_BE[unsure_B], self.index.vectors_NE, k)[1]
        return ranked_BK

    def neighbours(self, z_BE: torch.Tensor, k: int) -> Neighbours:
        """The k nearest rows of each query by cosine, as the index finds them, in the order of their exact cosines.

        Args:
            z_BE: Queries (B, E), on any device, of any norm.
            k: How many, at most the reference's rows.
        """
        import torch

        positions_BK = self.positions(z_BE, k)
        vectors_BKE = torch.from_numpy(self.index.gather(positions_BK)).to(z_BE)
        cos_BK = torch.nn.functional.cosine_similarity(z_BE[:, None], vectors_BKE, dim=-1)
        order_BK = cos_BK.detach().argsort(dim=-1, descending=True, stable=True)  # codes order only roughly
        cos_BK = cos_BK.gather(1, order_BK)
        vectors_BKE = vectors_BKE.take_along_dim(order_BK[:, :, None], 1)
        positions_BK = np.take_along_axis(positions_BK, order_BK.cpu().numpy(), 1)
        return Neighbours(cos_BK, self.ids(positions_BK), vectors_BKE, positions_BK)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Ids of rows by their numbers, an array of str of the same shape."""
        taken = self.table["id"].take(positions.ravel())
        return taken.to_numpy(zero_copy_only=False).reshape(positions.shape)


def find(path: str | Path) -> Path:
    """The reference folder at a path that names it, or the output that holds it.

    One on remote storage is copied to this machine first (`index.copies`).

    Raises:
        FileNotFoundError: There is none.
        ValueError: A link in it leads out of it.
    """
    if "://" in str(path):
        return fetched(str(path), ("", FOLDER))
    for folder in (Path(path), Path(path) / FOLDER):
        if (folder / "reference.json").exists():
            own = Folder.at(str(path))
            for file in folder.iterdir():
                own.path(file.relative_to(path).as_posix())
            return folder
    raise FileNotFoundError(
        f"no finished reference at {path}: run `latentmill run-job` on a job file with `job: reference` to make one"
    )


def require_encoder(folder: Path, made_with: Mapping[str, str] | None, asked_for: Mapping[str, str]) -> None:
    """Raise `ReferenceMismatch` unless both descriptions are of the same weights."""
    if made_with is None:
        raise ReferenceMismatch(
            f"the reference {folder} was made from embeddings whose encoder was not named, but this job encodes with "
            f"{asked_for['path']}: make the reference again with `encoder:` set, so that the two can be compared"
        )
    if made_with["fingerprint"] != asked_for["fingerprint"]:
        raise ReferenceMismatch(
            f"the reference {folder} was made with the image encoder {made_with['path']} "
            f"(fingerprint {made_with['fingerprint']}), but this job encodes with {asked_for['path']} "
            f"({asked_for['fingerprint']}): embeddings of different encoders cannot be compared; "
            "use the reference's encoder, or make a reference with this one"
        )


@dataclass(frozen=True)
class Shard:
    """Embedded rows of one part file, as `build` takes them.

    Attributes:
        part: Number of the part file.
        ids: Row ids.
        rows_N: Their rows within the part file.
        vectors_NE: Their raw embeddings.
    """

    part: int
    ids: Sequence[str]
    rows_N: np.ndarray
    vectors_NE: np.ndarray


@dataclass(frozen=True)
class Origin:
    """What a reference is made of; with the plan it decides every byte.

    Attributes:
        source: Fingerprint of the shards.
        shard_rows: Embedded rows of each shard, in order.
        dim, dtype: Of the embeddings.
        encoder, text_encoder: As ``StageInfo.models`` describes them; None where unknown.
        shrinkage: Of the covariance.
    """

    source: str
    shard_rows: Sequence[int]
    dim: int
    dtype: str
    encoder: Mapping[str, str] | None
    text_encoder: Mapping[str, str] | None
    shrinkage: gaussian.Shrinkage


@dataclass(frozen=True)
class Captioned:
    """What captions add to a reference.

    Attributes:
        texts: Yields the shards' text embeddings in order; called only if they are not gathered yet.
        pairs: Joint statistics of all captioned rows.
    """

    texts: Callable[[], Iterable[captions.Texts]]
    pairs: joint.Pairs


def build(
    folder: Path,
    origin: Origin,
    plan: neighbours.Plan,
    shards: Callable[[], Iterable[Shard]],
    moments: Callable[[], Iterable[gaussian.Moments]],
    step: neighbours.Step = lambda name, done, total: None,
    texts: neighbours.Texts | None = None,
    captioned: Captioned | None = None,
) -> dict[str, Any]:
    """Make a reference in a folder, or go on where an earlier call was stopped.

    Args:
        shards: Yields the shards in order; called again only if the vectors are not gathered yet.
        moments: Yields the shards' statistics in order.
        step: Told of progress: name, done, total.
        texts: See `neighbours.build`.
        captioned: Text embeddings of captions, and the joint statistics; None: there are none.

    Returns:
        The contents of ``reference.json``.

    Raises:
        ValueError: There are fewer than two embedded rows, or the statistics are of other rows.
    """
    rows = sum(origin.shard_rows)
    if rows < 2:
        raise ValueError(f"a reference needs at least 2 embedded rows, there are {rows}")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"source": origin.source, "dim": origin.dim, "dtype": origin.dtype, "rows": rows}
    gathered = record.read(folder / "vectors.npy", facts)
    if gathered is None or record.read(folder / "rows.arrow", facts) is None:
        (folder / "reference.json").unlink(missing_ok=True)
        gathered = _gather(folder, facts, len(origin.shard_rows), shards(), step)
    total = gaussian.merge(moments())
    if total.rows != rows:
        raise ValueError(f"the shards' statistics are of {total.rows} rows, their files hold {rows}")
    normal = gaussian.fit(total, origin.shrinkage)
    gaussian.save(folder / "gaussian", total, normal, {"source": origin.source})
    vectors_NE = np.load(folder / "vectors.npy", mmap_mode="r")
    made_from = {"vectors": gathered["checksum"]}
    built = neighbours.build(vectors_NE, origin.shard_rows, folder, plan, made_from, step, texts)
    told: dict[str, Any] = {}
    if captioned is not None:
        made: dict[str, Any] = {"captioned": 0}
        if captioned.pairs.rows:
            made = captions.build(folder, facts, plan, captioned.texts, captioned.pairs, step)
        told["captions"] = {name: made.get(name) for name in CAPTIONS_TOLD}
    described = {
        **facts,
        **told,
        "encoder": dict(origin.encoder) if origin.encoder else None,
        "text_encoder": dict(origin.text_encoder) if origin.text_encoder else None,
        "vectors": gathered["checksum"],
        "mean_norm": normal.mean_norm,
        "shrinkage": normal.shrinkage,
        "index": {name: built[name] for name in neighbours.TOLD if name in built},
    }
    record.write_facts(folder / "reference.json", described)
    return described


def _gather(
    folder: Path, facts: Mapping[str, Any], count: int, shards: Iterable[Shard], step: neighbours.Step
) -> dict[str, Any]:
    """Embeddings and row numbers of all shards in one file each."""
    import pyarrow as pa

    drafts = folder / "vectors.tmp", folder / "rows.tmp"
    vectors_NE = np.lib.format.open_memmap(drafts[0], "w+", facts["dtype"], (facts["rows"], facts["dim"]))
    schema = pa.schema([("id", pa.string()), ("part", pa.int32()), ("row", pa.int32())])
    filled = 0
    with pa.OSFile(str(drafts[1]), "wb") as sink, pa.ipc.new_file(sink, schema) as table:
        for number, shard in enumerate(shards, start=1):
            size = len(shard.vectors_NE)
            vectors_NE[filled : filled + size] = shard.vectors_NE
            columns = [pa.array(shard.ids, pa.string()), pa.array(np.full(size, shard.part), pa.int32())]
            table.write_batch(pa.record_batch([*columns, pa.array(shard.rows_N, pa.int32())], schema=schema))
            filled += size
            step("gather", number, count)
    if filled != facts["rows"]:
        raise ValueError(f"the shards hold {filled} embedded rows, their records say {facts['rows']}")
    vectors_NE.flush()
    record.commit(drafts[1], folder / "rows.arrow", facts)
    return record.commit(drafts[0], folder / "vectors.npy", facts)
