"""Nearest neighbours by cosine with FAISS: built by shards, resumable, measured.

Tensor legend: N rows, E embedding width, B queries, K neighbours.

An index is built over raw embeddings in a memory-mapped ``vectors.npy``; FAISS sees them at unit length, so that inner
products are cosines. Four steps, each committed by a record beside its file, so that a build that was killed goes on
where it stopped and ends with the same bytes: train on a random sample, add each part to an index of its own (parts in
parallel), merge the parts in order, then choose ``nprobe`` by measuring recall against exact search.
Codes below eight bits a number are searched with a surplus that is ranked again by the exact vectors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import record

SCAN_ROWS = 65536  # rows that a scan holds as float32 at once
EXACT = "Flat"  # FAISS's name of an index that compares with every vector
FLAT_ROWS = 20_000  # below it, exact search is quick enough to need no structure
TRAIN_ROWS_PER_LIST = 64  # FAISS wants at least 39
RECALL_AT = (1, 10, 100)
SEED = 20_240_117
NPROBES = (1, *(n * 2**i for i in range(15) for n in (2, 3)))  # 1, 2, 3, 4, 6, 8, 12, ...
TOLD = (
    "factory", "nprobe", "recall", "queries", "text_recall", "text_queries", "index_bytes", "checksum",
)  # fmt: skip
"""What the facts of a whole repeat of its index."""
GPU_MOST = 2048  # neighbours, and lists looked into, that FAISS can handle on a GPU


@dataclass(frozen=True)
class Codec:
    """How an inverted list stores a vector.

    Attributes:
        name: The last part of a FAISS factory string.
        bits: A number of the vector.
        extra: Further bytes a vector, its id included.
        surplus: Candidates fetched for each neighbour wanted, to be ranked by the exact vectors.
        prefix: The first part of the factory string, with the embedding width as ``{dim}``.
    """

    name: str
    bits: int
    extra: int
    surplus: int
    prefix: str = ""


# Product quantisers are left to explicit factory strings: training one took hundreds of times as long as these.
CODECS = (
    Codec("Flat", 32, 8, 1),
    Codec("SQfp16", 16, 8, 1),
    Codec("SQ8", 8, 8, 1),
    Codec("SQ6", 6, 8, 4),
    Codec("SQ4", 4, 8, 8),
    Codec("RaBitQ", 1, 16, 20, "RR{dim},"),
)


@dataclass(frozen=True)
class Plan:
    """How to build an index.

    Attributes:
        factory: A FAISS factory string; None chooses by rows, width and memory.
        memory: Bytes that the index may take in memory. A larger one keeps its lists on disk.
        recall: Target of recall@10, by which ``nprobe`` is chosen.
        part_rows: Rows of a part, at least (parts end where shards do).
        threads: Parts added at a time.
        spread: Has a function of many parts computed on other machines, in order: called with the function, the parts,
            what all of them share, and the bytes ``size`` of one with its answer. None: there are none. A GPU that this
            process has is quicker than they, and goes before.
    """

    factory: str | None = None
    memory: int = 4 << 30
    recall: float = 0.95
    part_rows: int = 1 << 17
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    spread: Callable[..., Iterator[np.ndarray]] | None = None


def lists(rows: int) -> int:
    """Inverted lists for so many rows: the power of two nearest 2 sqrt(rows), with enough rows to train each."""
    wanted = 2 ** round(math.log2(2 * math.sqrt(max(rows, 1))))
    return max(1, min(wanted, rows // TRAIN_ROWS_PER_LIST))


def choose(rows: int, dim: int, memory: int) -> str:
    """A FAISS factory string: exact for few rows, else the finest codec whose index fits in memory.

    When not even the coarsest fits, that one is taken, and `build` keeps its lists on disk.
    """
    if rows <= FLAT_ROWS and rows * dim * 4 <= memory:
        return EXACT
    count = lists(rows)
    coarse = f"IVF{count}" if count < 1 << 16 else f"IVF{count}_HNSW32"
    left = memory - count * dim * 4

    def size(codec: Codec) -> float:
        return rows * (dim * codec.bits / 8 + codec.extra) + (dim * dim * 4 if codec.prefix else 0)

    fitting = [codec for codec in CODECS if size(codec) <= left]
    codec = fitting[0] if fitting else CODECS[-1]
    return f"{codec.prefix.format(dim=dim)}{coarse},{codec.name}"


def surplus(factory: str) -> int:
    """Candidates to fetch for each neighbour wanted. Unknown codecs, product quantisers for one, get the largest."""
    name = factory.rpartition(",")[2]
    return next((codec.surplus for codec in CODECS if codec.name == name), CODECS[-1].surplus)


def unit(x_NE: np.ndarray) -> np.ndarray:
    """Rows at unit length, float32. A zero row stays zero."""
    y_NE = np.array(x_NE, dtype=np.float32)
    y_NE /= np.maximum(np.linalg.norm(y_NE, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return y_NE


def exact(q_BE: np.ndarray, vectors_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact nearest neighbours by cosine, scanned in blocks: cosines and row numbers (B, k), best first."""
    q_BE = unit(q_BE)
    best_BK, rows_BK = np.empty((len(q_BE), 0), np.float32), np.empty((len(q_BE), 0), np.int64)
    for start in range(0, len(vectors_NE), SCAN_ROWS):
        cos_BN = q_BE @ unit(vectors_NE[start : start + SCAN_ROWS]).T
        keep = min(k, cos_BN.shape[1])
        top_BK = np.argpartition(cos_BN, cos_BN.shape[1] - keep, axis=1)[:, -keep:]
        best_BK = np.concatenate([best_BK, np.take_along_axis(cos_BN, top_BK, 1)], axis=1)
        rows_BK = np.concatenate([rows_BK, top_BK + start], axis=1)
        order_BK = np.lexsort((rows_BK, -best_BK), axis=1)[:, :k]
        best_BK, rows_BK = np.take_along_axis(best_BK, order_BK, 1), np.take_along_axis(rows_BK, order_BK, 1)
    return best_BK, rows_BK


def parts_of(shards: Sequence[int], part_rows: int) -> list[tuple[int, int]]:
    """Row ranges of the parts: whole shards, joined until a part has at least ``part_rows`` rows."""
    bounds, start, stop = [], 0, 0
    for rows in shards:
        stop += rows
        if stop - start >= part_rows:
            bounds.append((start, stop))
            start = stop
    if stop > start:
        bounds.append((start, stop))
    return bounds


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """FAISS's threads for calls made by this thread."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def gpus() -> int:
    """GPUs that this build of FAISS can use."""
    import faiss

    return getattr(faiss, "get_num_gpus", lambda: 0)()


def on_gpu(index: Any, device: int = 0) -> Any:
    """The index on a GPU, or itself where FAISS has none or no GPU version of its type."""
    import faiss

    movable = ("IndexFlat", "IndexFlatIP", "IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ")
    if gpus() == 0 or type(index).__name__ not in movable:
        return index
    if type(index).__name__ == "IndexIVFScalarQuantizer" and index.sq.qtype == faiss.ScalarQuantizer.QT_6bit:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device, index)


def _inverted_file(index: Any) -> Any | None:
    """The inverted file inside an index, behind whatever rotates vectors first, or None."""
    import faiss

    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def _train(vectors_NE: np.ndarray, factory: str, path: Path, facts: Mapping[str, Any]) -> None:
    import faiss

    index = faiss.index_factory(vectors_NE.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    ivf = _inverted_file(index)
    if not index.is_trained:
        wanted = max(TRAIN_ROWS_PER_LIST * ivf.nlist, 1 << 14) if ivf is not None else 1 << 16
        sample = np.random.default_rng(SEED).choice(len(vectors_NE), min(wanted, len(vectors_NE)), replace=False)
        if ivf is not None:
            ivf.cp.seed, ivf.cp.min_points_per_centroid = SEED, 1
            clustering = on_gpu(faiss.IndexFlatIP(ivf.d))
            ivf.clustering_index = clustering
        index.train(unit(vectors_NE[np.sort(sample)]))
        if ivf is not None:
            ivf.clustering_index = None
    draft = path.with_suffix(".tmp")
    faiss.write_index(index, str(draft))
    record.commit(draft, path, facts)


def _add(vectors_NE: np.ndarray, span: tuple[int, int], trained: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Index the rows of one part; their numbers within the whole are their FAISS ids."""
    import faiss

    with _threads(1):
        empty = faiss.read_index(str(trained))
        index = on_gpu(empty)
        _fill(index, vectors_NE[slice(*span)], span[0], facts["factory"])
        draft = path.with_suffix(".tmp")
        faiss.write_index(index if index is empty else faiss.index_gpu_to_cpu(index), str(draft))
    record.commit(draft, path, facts)


def _fill(index: Any, vectors_NE: np.ndarray, first: int, factory: str) -> None:
    """Add rows to an index, numbered from ``first`` on."""
    for start in range(0, len(vectors_NE), SCAN_ROWS // 8):
        block_NE = unit(vectors_NE[start : start + SCAN_ROWS // 8])
        if "IVF" in factory:
            index.add_with_ids(block_NE, np.arange(first + start, first + start + len(block_NE)))
        else:
            index.add(block_NE)


@dataclass(frozen=True)
class Part:
    """Rows to be indexed by themselves, on any machine.

    Attributes:
        first: Number of the first one within the whole.
        vectors_NE: Raw embeddings.
        factory: The index's factory string.
    """

    first: int
    vectors_NE: np.ndarray
    factory: str

    def __str__(self) -> str:
        return f"rows {self.first:,} to {self.first + len(self.vectors_NE) - 1:,} of the index"


def indexed(part: Part, trained: np.ndarray) -> np.ndarray:
    """The index of a part: the same bytes as FAISS writes to a file.

    Args:
        trained: The empty index's bytes.
    """
    import faiss

    with _threads(1):
        index = faiss.deserialize_index(trained)
        _fill(index, part.vectors_NE, part.first, part.factory)
        written: np.ndarray = faiss.serialize_index(index)
    return written


@dataclass(frozen=True)
class _Parts:
    """The parts of a build: where each goes, and what its record says."""

    vectors_NE: np.ndarray
    bounds: Sequence[tuple[int, int]]
    trained: Path
    paths: Sequence[Path]
    facts: Sequence[Mapping[str, Any]]

    def waiting(self) -> list[int]:
        return [i for i, path in enumerate(self.paths) if record.read(path, self.facts[i]) is None]

    def add(self, numbers: Sequence[int], plan: Plan) -> Iterator[None]:
        """Index these parts; an answer for each."""
        if plan.spread is not None and len(numbers) > 1 and gpus() == 0:
            yield from self._elsewhere(numbers, plan.spread)
            return
        with ThreadPoolExecutor(max(1, plan.threads) if gpus() == 0 else 1) as pool:
            futures = [
                pool.submit(_add, self.vectors_NE, self.bounds[i], self.trained, self.paths[i], self.facts[i])
                for i in numbers
            ]
            for future in futures:
                yield future.result()

    def _elsewhere(self, numbers: Sequence[int], spread: Callable[..., Iterator[np.ndarray]]) -> Iterator[None]:
        trained = np.fromfile(self.trained, np.uint8)
        parts = (
            Part(self.bounds[i][0], np.asarray(self.vectors_NE[slice(*self.bounds[i])]), self.facts[i]["factory"])
            for i in numbers
        )
        rows = max(stop - start for start, stop in (self.bounds[i] for i in numbers))
        width = self.vectors_NE.shape[1]
        size = len(trained) + rows * width * (self.vectors_NE.itemsize + 4)  # codes are float32 at most
        for i, written in zip(numbers, spread(indexed, parts, trained, size=size), strict=True):
            draft = self.paths[i].with_suffix(".tmp")
            written.tofile(draft)
            record.commit(draft, self.paths[i], self.facts[i])
            yield


def _merge(parts: Sequence[Path], trained: Path, folder: Path, on_disk: bool, facts: Mapping[str, Any]) -> None:
    """All parts in one index, in order. On disk, the lists go to a file of their own that search maps into memory."""
    import faiss

    index = faiss.read_index(str(trained))
    ivf = _inverted_file(index)
    data_checksum = None
    if ivf is None or not on_disk:
        for part in parts:
            index.merge_from(faiss.read_index(str(part)), 0)
    else:
        opened = [faiss.read_index(str(part), faiss.IO_FLAG_MMAP) for part in parts]
        pointers = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
        for part_index in opened:
            pointers.push_back(faiss.extract_index_ivf(part_index).invlists)
        draft = folder / "index.ivfdata.tmp"
        draft.unlink(missing_ok=True)
        merged = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(draft))
        index.ntotal = ivf.ntotal = merged.merge_from_multiple(pointers.data(), pointers.size(), False)
        ivf.replace_invlists(merged, True)
        merged.this.disown()  # type: ignore[attr-defined]
        merged.filename = "index.ivfdata"  # opened from the index's own folder, wherever that is moved to
        data = record.commit(draft, folder / "index.ivfdata", facts)
        data_checksum = data["checksum"]
    draft = folder / "index.tmp"
    faiss.write_index(index, str(draft))
    record.commit(draft, folder / "index.merged", {**facts, "lists": data_checksum})


Step = Callable[[str, int, int], None]
Texts = Callable[[], np.ndarray | None]


def build(
    vectors_NE: np.ndarray,
    shards: Sequence[int],
    folder: Path,
    plan: Plan,
    facts: Mapping[str, Any],
    step: Step = lambda name, done, total: None,
    texts: Texts | None = None,
) -> dict[str, Any]:
    """Build, or go on building, ``index.faiss`` in a folder.

    Args:
        vectors_NE: Raw embeddings, memory-mapped.
        shards: Rows of each shard, in order; they sum to N.
        folder: Where the index goes; its subfolder ``parts`` holds what is not merged yet.
        plan: Type, memory, target.
        facts: What the vectors are (a fingerprint); a build from other facts starts afresh.
        step: Told of progress: name, done, total.
        texts: Makes embeddings (B, E) of texts such as people search with, where they do; asked where the index does
            not search exactly.

    Returns:
        The contents of ``index.faiss.json``: ``facts``, the factory string, bytes, ``nprobe``, and measured recall.
    """
    rows, dim = vectors_NE.shape
    if sum(shards) != rows:
        raise ValueError(f"the shards hold {sum(shards)} rows, there are {rows} vectors")
    if rows == 0:
        raise ValueError("an index needs at least one row")
    factory = plan.factory or choose(rows, dim, plan.memory)
    bounds = parts_of(shards, plan.part_rows)
    facts = {**facts, "factory": factory, "rows": rows, "dim": dim, "parts": bounds}
    facts = json.loads(json.dumps(facts))  # as a record gives it back
    final = folder / "index.faiss"
    asked = {**facts, "recall_wanted": plan.recall, **({"tuned_on_texts": True} if texts and factory != EXACT else {})}
    work = folder / "parts"
    if (done := record.read(final, asked)) is not None and _lists_match(folder, done):
        shutil.rmtree(work, ignore_errors=True)
        return done
    work.mkdir(parents=True, exist_ok=True)
    seconds = {}

    trained = work / "trained.faiss"
    begun = time.perf_counter()
    if (start := record.read(trained, facts)) is None:
        step("train", 0, 1)
        _train(vectors_NE, factory, trained, facts)
        start = record.read(trained, facts)
        assert start is not None
    seconds["train"] = time.perf_counter() - begun

    begun = time.perf_counter()
    paths = [work / f"part-{number:05d}.faiss" for number in range(len(bounds))]
    added = [{"span": list(span), "trained": start["checksum"], **facts} for span in bounds]
    parts = _Parts(vectors_NE, bounds, trained, paths, added)
    merged = record.read(folder / "index.merged", {**facts, "trained": start["checksum"]})
    waiting = [] if merged else parts.waiting()
    for count, _ in enumerate(parts.add(waiting, plan)):
        step("add", len(bounds) - len(waiting) + count + 1, len(bounds))
    seconds["add"] = time.perf_counter() - begun

    begun = time.perf_counter()
    if merged is None:
        step("merge", 0, 1)
        repeated = (len(paths) - 1) * trained.stat().st_size  # every part holds the centroids
        on_disk = sum(path.stat().st_size for path in paths) - repeated > plan.memory
        _merge(paths, trained, folder, on_disk, {**facts, "trained": start["checksum"]})
    seconds["merge"] = time.perf_counter() - begun

    begun = time.perf_counter()
    step("measure", 0, 1)
    size = (folder / "index.merged").stat().st_size
    lists_file = folder / "index.ivfdata"
    data_checksum = json.loads(record.record_path(folder / "index.merged").read_text())["lists"]
    text_BE = None if texts is None or factory == EXACT else texts()
    measured = tune(Index.read(folder / "index.merged", vectors_NE, factory), plan.recall, text_BE)
    seconds["measure"] = time.perf_counter() - begun
    described = {
        **asked,
        **measured,
        "lists": data_checksum,
        "index_bytes": size + (lists_file.stat().st_size if data_checksum else 0),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    record.record_path(folder / "index.merged").unlink()
    done = record.commit(folder / "index.merged", final, described)
    shutil.rmtree(work)
    return done


def _lists_match(folder: Path, done: Mapping[str, Any]) -> bool:
    """Whether the lists that an index keeps on disk are the ones it was merged with."""
    if done["lists"] is None:
        return True
    data = record.read(folder / "index.ivfdata", {})
    return data is not None and data["checksum"] == done["lists"]


@dataclass(frozen=True)
class Index:
    """An opened index, memory-mapped, with the vectors that it indexes.

    Attributes:
        faiss_index: The FAISS index.
        vectors_NE: The raw vectors, memory-mapped.
        surplus: Candidates fetched for each neighbour wanted, then ranked exactly; 1: FAISS's order is kept.
        facts: Contents of ``index.faiss.json``.
        path: The index's file; None: it never was one.
    """

    faiss_index: Any
    vectors_NE: np.ndarray
    surplus: int
    facts: Mapping[str, Any]
    path: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Open ``index.faiss`` and ``vectors.npy`` in a folder.

        Raises:
            FileNotFoundError: When either, or the index's record, is missing.
        """
        facts = json.loads(record.record_path(folder / "index.faiss").read_text())
        vectors_NE = np.load(folder / "vectors.npy", mmap_mode="r")
        opened = cls.read(folder / "index.faiss", vectors_NE, facts["factory"], facts)
        return opened.probing(facts["nprobe"])

    @classmethod
    def read(cls, path: Path, vectors_NE: np.ndarray, factory: str, facts: Mapping[str, Any] | None = None) -> Index:
        """Open an index file, memory-mapped as far as its type allows."""
        import faiss

        on_disk = json.loads(record.record_path(path).read_text())["lists"] is not None

        # Lists in a file of their own are mapped with IO_FLAG_ONDISK_SAME_DIR alone: IO_FLAG_MMAP would skip that file.
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR if on_disk else faiss.IO_FLAG_MMAP
        faiss_index = faiss.read_index(str(path), flags | faiss.IO_FLAG_READ_ONLY)
        return cls(faiss_index, vectors_NE, surplus(factory) if factory != EXACT else 1, facts or {}, path)

    def probing(self, nprobe: int | None) -> Index:
        """Itself, looking into so many lists from now on."""
        ivf = _inverted_file(self.faiss_index)
        if ivf is not None and nprobe is not None:
            ivf.nprobe = min(nprobe, ivf.nlist)
        return self

    def on_gpu(self, device: int, memory: int) -> Index:
        """Itself, searched by FAISS on a GPU, if its type and its size allow; the exact vectors stay where they are.

        Args:
            device: Number of the GPU.
            memory: Bytes that it may take there.
        """
        import faiss

        nprobe = self.facts["nprobe"] or 0
        fits = self.facts["lists"] is None and self.facts["index_bytes"] <= memory and nprobe <= GPU_MOST
        if self.path is None or not fits:
            return self
        whole = replace(self, faiss_index=faiss.read_index(str(self.path))).probing(nprobe or None)
        moved = on_gpu(whole.faiss_index, device)
        return self if moved is whole.faiss_index else replace(self, faiss_index=moved)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """Raw vectors by row number, float32, shape ``positions.shape + (E,)``."""
        return np.asarray(self.vectors_NE[positions], dtype=np.float32)

    def search(self, q_BE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Nearest rows by cosine.

        Args:
            q_BE: Queries of any norm.
            k: Neighbours wanted.

        Returns:
            Cosines (by the index's codes, unless it ranks exactly) and row numbers, (B, k), best first.

        Raises:
            ValueError: When k is larger than the number of rows, or the width is wrong.
        """
        rows, dim = self.vectors_NE.shape
        if not 1 <= k <= rows:
            raise ValueError(f"k must lie between 1 and the {rows} rows of the reference, got {k}")
        if q_BE.ndim != 2 or q_BE.shape[1] != dim:
            raise ValueError(f"queries of width {dim} wanted, got an array of shape {q_BE.shape}")
        q_BE = unit(q_BE)
        cos_BK, rows_BK = self.faiss_index.search(q_BE, min(k * self.surplus, rows))
        if self.surplus > 1:
            cos_BK, rows_BK = self.rank(q_BE, rows_BK, k)
        short_B = (rows_BK < 0).any(axis=1)  # the lists looked into held fewer than k rows
        if short_B.any():
            cos_BK[short_B], rows_BK[short_B] = exact(q_BE[short_B], self.vectors_NE, k)
        return cos_BK, rows_BK

    def rank(self, q_BE: np.ndarray, rows_BK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k of some candidates by the exact vectors: cosines and row numbers (B, k).

        Args:
            q_BE: Queries of unit length, float32.
            rows_BK: Each one's candidates, at least k; -1 is none.
        """
        cos_BK = np.empty(rows_BK.shape, np.float32)
        for b in range(len(q_BE)):
            cos_BK[b] = unit(self.vectors_NE[rows_BK[b]]) @ q_BE[b]
        cos_BK[rows_BK < 0] = -np.inf
        order_BK = np.argsort(-cos_BK, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cos_BK, order_BK, 1), np.take_along_axis(rows_BK, order_BK, 1)


def tune(index: Index, recall: float, text_BE: np.ndarray | None = None, queries: int = 1000) -> dict[str, Any]:
    """Choose the smallest ``nprobe`` that reaches a recall@10 for every kind of query, and report what was measured.

    Two kinds: random rows of the index, whose own match counts for neither side, so that recall@1 asks for the nearest
    *other* row; and texts. Embeddings of texts lie apart from those of pictures (Liang et al., 2022, "Mind the gap"):
    the lists that serve the one may miss what the other looks for. Recall@k is the share of the k exact neighbours that
    are among the k found.

    Args:
        text_BE: Embeddings of texts; None: nobody will search by text.
    """
    rows = len(index.vectors_NE)
    own_B = np.sort(np.random.default_rng(SEED + 1).choice(rows, min(queries, rows), replace=False))
    deepest = min(max(RECALL_AT), rows - 1)
    if deepest < 1:
        return {"nprobe": None, "recall": {}, "queries": len(own_B), "queries_per_second": None}
    kinds = {"": _Queries.of(index, np.asarray(index.vectors_NE[own_B]), deepest, own_B)}
    if text_BE is not None:
        kinds["text_"] = _Queries.of(index, text_BE, deepest)
    ivf = _inverted_file(index.faiss_index)
    depths = [k for k in RECALL_AT if k <= deepest] or [deepest]
    aim = min(10, deepest)
    for nprobe in [None] if ivf is None else [n for n in NPROBES if n < ivf.nlist] + [ivf.nlist]:
        index.probing(nprobe)
        if all(asked.recall(index, aim) >= recall for asked in kinds.values()):
            break
    found: dict[str, Any] = {"nprobe": nprobe}
    for kind, asked in kinds.items():
        found[f"{kind}recall"] = {str(k): round(asked.recall(index, k), 5) for k in depths}
        found[f"{kind}queries"] = len(asked.q_BE)
    begun = time.perf_counter()
    index.search(kinds[""].q_BE, aim)
    rate = len(own_B) / (time.perf_counter() - begun)
    return {**found, "queries_per_second": round(rate, 1)}


@dataclass(frozen=True)
class _Queries:
    """Queries with their exact neighbours.

    Attributes:
        q_BE: Of any norm.
        truth_BK: Row numbers of the nearest rows, best first.
        own_B: The row that each query is itself and that does not count; None: they are none of the index's.
    """

    q_BE: np.ndarray
    truth_BK: np.ndarray
    own_B: np.ndarray | None

    @staticmethod
    def of(index: Index, q_BE: np.ndarray, deepest: int, own_B: np.ndarray | None = None) -> _Queries:
        if own_B is None:
            return _Queries(q_BE, exact(q_BE, index.vectors_NE, deepest)[1], None)
        return _Queries(q_BE, _others(exact(q_BE, index.vectors_NE, deepest + 1)[1], own_B), own_B)

    def recall(self, index: Index, k: int) -> float:
        if self.own_B is None:
            found_BK = index.search(self.q_BE, k)[1]
        else:
            found_BK = _others(index.search(self.q_BE, k + 1)[1], self.own_B)
        shares = [len(np.intersect1d(a, b)) / k for a, b in zip(found_BK, self.truth_BK[:, :k], strict=True)]
        return float(np.mean(shares))


def _others(rows_BK: np.ndarray, own_B: np.ndarray) -> np.ndarray:
    """Each row of neighbours without the query itself (or without the last, where the query is not among them)."""
    is_own_BK = rows_BK == own_B[:, None]
    is_own_BK[~is_own_BK.any(axis=1), -1] = True
    return rows_BK[~is_own_BK].reshape(len(rows_BK), -1)
