"""The training set of the miniature models: pictures, captions and labels, drawn once and kept in a work folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from micro import world

MAX_THINGS = 3
GRID = 8
"""Cells a side of the grid on which the oracle reads objects."""

FIELDS = {"shape": world.SHAPES, "color": tuple(world.COLORS), "texture": world.TEXTURES, "size": tuple(world.SIZES)}


def labels(scene: world.Scene) -> np.ndarray:
    """(3, 7) float32: shape, colour, texture, size as indices, then x, y, r in pixels; -1 where there is no object."""
    out = np.full((MAX_THINGS, 7), -1, np.float32)
    for i, t in enumerate(scene.things):
        out[i] = [*(FIELDS[f].index(getattr(t, f)) for f in FIELDS), t.x, t.y, t.r]
    return out


def cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array at ``path``, memory-mapped; made and put there first if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, make())
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def split_pictures(work: Path, split: world.Split, count: int, seed: int = 0) -> np.ndarray:
    """(n, 64, 64, 3) uint8, memory-mapped."""
    return cached(work / f"{split}-{seed}-{count}.npy", lambda: world.pictures(range(count), split, seed))


def split_labels(work: Path, split: world.Split, count: int, seed: int = 0) -> np.ndarray:
    """(n, 3, 7) float32, see `labels`."""
    make = lambda: np.stack([labels(world.sample_scene(i, split, seed)) for i in range(count)])  # noqa: E731
    return cached(work / f"{split}-{seed}-{count}-labels.npy", make)


def split_backgrounds(work: Path, split: world.Split, count: int, seed: int = 0) -> np.ndarray:
    """(n,) int64: index of the background colour."""
    names = tuple(world.BACKGROUNDS)
    make = lambda: np.array([names.index(world.sample_scene(i, split, seed).background) for i in range(count)])  # noqa: E731
    return cached(work / f"{split}-{seed}-{count}-backgrounds.npy", make)


def captions_of(index: int, scene: world.Scene, split: world.Split, wordings: int, seed: int = 0) -> list[str]:
    """Several wordings of a scene's caption; the first names everything."""
    rng = np.random.default_rng([7, world._SPLIT_SEED[split], seed, index])
    return [world.caption(scene, rng, "full" if w == 0 else "varied") for w in range(wordings)]


def split_captions(work: Path, split: world.Split, count: int, wordings: int, seed: int = 0) -> np.ndarray:
    """(n, wordings) str: several wordings of each picture's caption; the first names everything."""

    def make() -> np.ndarray:
        return np.array(
            [captions_of(i, world.sample_scene(i, split, seed), split, wordings, seed) for i in range(count)]
        )

    return cached(work / f"{split}-{seed}-{count}-captions{wordings}.npy", make)
