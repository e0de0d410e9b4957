"""Whether ids are unique, in memory that does not grow with their number, and digests of a shard's ids in order."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

HELD = 4_000_000
BUCKETS = 256


class Uniqueness:
    """Finds ids that occur twice among any number of them.

    Eight bytes an id (a hash) are held for the first four million (32 MB); beyond that they go to 256 temporary
    files by their top bits, and each is sorted by itself. A hit is a suspicion: two ids may share a hash, so the
    caller reads the ids again and compares the suspects themselves.
    """

    def __init__(self, held: int = HELD) -> None:
        self._held, self._blocks, self._count = held, list[np.ndarray](), 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @staticmethod
    def hashes(ids: Iterable[str], count: int) -> np.ndarray:
        """64-bit hashes, the same for equal ids within this process."""
        return np.fromiter(map(hash, ids), np.int64, count).view(np.uint64)

    def add(self, ids: list[str]) -> None:
        self._blocks.append(self.hashes(ids, len(ids)))
        self._count += len(ids)
        if self._count >= self._held:
            self._spill()

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="latentmill-ids-")
        block = np.sort(np.concatenate(self._blocks))
        edges = np.searchsorted(block, np.arange(1, BUCKETS, dtype=np.uint64) << np.uint64(56))
        for bucket, part in enumerate(np.split(block, edges)):
            with open(Path(self._folder.name) / f"{bucket:03d}", "ab") as handle:
                part.tofile(handle)
        self._blocks, self._count = [], 0

    def suspects(self) -> set[int]:
        """Hashes that occur more than once."""
        if self._folder is None:
            return _repeated(np.concatenate(self._blocks)) if self._blocks else set()
        if self._blocks:
            self._spill()
        with self._folder as name:
            found: set[int] = set()
            for path in sorted(Path(name).iterdir()):
                found |= _repeated(np.fromfile(path, np.uint64))
        return found


def _repeated(hashes: np.ndarray) -> set[int]:
    ordered = np.sort(hashes)
    return {int(value) for value in np.unique(ordered[1:][ordered[1:] == ordered[:-1]])}


def digest(ids: Iterable[str]) -> str:
    """Digest of ids in their order."""
    return hashlib.blake2b("\0".join(ids).encode(errors="backslashreplace"), digest_size=16).hexdigest()
