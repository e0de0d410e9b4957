"""Random numbers of a row: a function of (job seed, row id, purpose), never of the batch, the worker or the clock."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def row_seed(seed: int, row_id: str, purpose: str = "") -> int:
    """A 63-bit seed for one purpose of one row (ours).

    Args:
        seed: The job's seed.
        row_id: The row's id.
        purpose: What the numbers are for; different purposes give independent numbers.
    """
    digest = hashlib.blake2b(f"{seed}\x1f{row_id}\x1f{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_generator(seed: int, row_id: str, purpose: str = "") -> torch.Generator:
    """A CPU generator seeded by `row_seed`: the same numbers whatever device the row is computed on."""
    return torch.Generator("cpu").manual_seed(row_seed(seed, row_id, purpose))


def row_normal(shape: Sequence[int], seed: int, row_ids: Sequence[str], purpose: str = "") -> torch.Tensor:
    """Standard normal numbers, (len(row_ids), *shape), float32 on the CPU, each row from its own generator."""
    if not row_ids:
        return torch.empty((0, *shape))
    return torch.stack([torch.randn(tuple(shape), generator=row_generator(seed, i, purpose)) for i in row_ids])
