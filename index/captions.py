"""The captions of a reference: text embeddings beside those of their pictures, joint statistics, and an index of texts.

Tensor legend: M captioned rows, T width of the text embeddings, E of the image embeddings.

On disk, in the folder ``captions`` of the reference::

    captions.json                          what they were made of; written last
    joint.safetensors                      sums over the pairs (`index.joint`)
    vectors.npy                            raw text embeddings (M, T)
    rows.npy                               which row of the reference each belongs to (M,)
    index.faiss, index.faiss.json          nearest captions (`index.neighbours`)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from index import joint, neighbours
from pipeline import record

FOLDER = "captions"


@dataclass(frozen=True)
class Texts:
    """Captioned rows of one shard, as `build` takes them.

    Attributes:
        rows_N: Their numbers within the reference.
        vectors_NT: Their raw text embeddings.
    """

    rows_N: np.ndarray
    vectors_NT: np.ndarray


@dataclass(frozen=True)
class Captions:
    """Everything memory-mapped.

    Attributes:
        facts: Contents of ``captions.json``.
        index: Nearest neighbours among the captions, by cosine; its vectors are the text embeddings.
        rows_M: Which row of the reference each caption belongs to.
        pairs: Joint statistics of texts and images.
    """

    facts: Mapping[str, Any]
    index: neighbours.Index
    rows_M: np.ndarray
    pairs: joint.Pairs

    @classmethod
    def open(cls, folder: Path) -> Captions:
        """Open what `build` made in the folder of a reference."""
        from safetensors.numpy import load_file

        below = folder / FOLDER
        facts = json.loads((below / "captions.json").read_text())
        rows_M = np.load(below / "rows.npy", mmap_mode="r")
        pairs = joint.Pairs.from_arrays(load_file(below / "joint.safetensors"))
        return cls(facts, neighbours.Index.open(below), rows_M, pairs)

    @cached_property
    def fit(self) -> joint.Fit:
        """The joint Gaussian, ready to be conditioned on texts."""
        return joint.Fit.of(self.pairs)


def build(
    folder: Path,
    facts: Mapping[str, Any],
    plan: neighbours.Plan,
    texts: Callable[[], Iterable[Texts]],
    pairs: joint.Pairs,
    step: neighbours.Step = lambda name, done, total: None,
) -> dict[str, Any]:
    """Make the captions of a reference, or go on where an earlier call was stopped.

    Args:
        folder: Of the reference.
        facts: What the reference was made of; from other facts all is made afresh.
        plan: Of the index.
        texts: Yields the shards' text embeddings in order; called only if they are not gathered yet.
        pairs: Joint statistics of all shards.
        step: Told of progress: name, done, total.

    Returns:
        The contents of ``captions.json``.

    Raises:
        ValueError: The statistics are of other rows.
    """
    from safetensors.numpy import save_file

    below = folder / FOLDER
    below.mkdir(exist_ok=True)
    facts = {**facts, "captioned": pairs.rows, "text_dim": pairs.texts}
    gathered = record.read(below / "vectors.npy", facts)
    if gathered is None or record.read(below / "rows.npy", facts) is None:
        gathered = _gather(below, facts, texts())
    draft = below / "joint.safetensors.tmp"
    save_file({name: np.ascontiguousarray(array) for name, array in pairs.to_arrays().items()}, draft)
    draft.replace(below / "joint.safetensors")
    whole, rest = divmod(pairs.rows, plan.part_rows)
    vectors_MT = np.load(below / "vectors.npy", mmap_mode="r")
    sizes = [plan.part_rows] * whole + [rest] * (rest > 0)
    built = neighbours.build(vectors_MT, sizes, below, plan, {"vectors": gathered["checksum"]}, step)
    described = {
        **facts,
        "modality_gap": pairs.gap,
        "matched_cosine": pairs.matched_cosine,
        "index": {name: built[name] for name in neighbours.TOLD if name in built},
    }
    record.write_facts(below / "captions.json", described)
    return described


def _gather(below: Path, facts: Mapping[str, Any], texts: Iterable[Texts]) -> dict[str, Any]:
    """Text embeddings and row numbers of all shards in one file each."""
    drafts = below / "vectors.tmp", below / "rows.tmp"
    rows, width = facts["captioned"], facts["text_dim"]
    vectors_MT = np.lib.format.open_memmap(drafts[0], "w+", facts["dtype"], (rows, width))
    rows_M = np.lib.format.open_memmap(drafts[1], "w+", np.int64, (rows,))
    filled = 0
    for shard in texts:
        size = len(shard.rows_N)
        vectors_MT[filled : filled + size] = shard.vectors_NT
        rows_M[filled : filled + size] = shard.rows_N
        filled += size
    if filled != rows:
        raise ValueError(f"the shards hold {filled} captioned rows, their statistics are of {rows}")
    vectors_MT.flush()
    rows_M.flush()
    record.commit(drafts[1], below / "rows.npy", facts)
    return record.commit(drafts[0], below / "vectors.npy", facts)
