"""What the prompt inversion benchmarks share: the miniature CLIP, a bank of real pictures, prompts with true pictures.

Legend: N bank rows, B prompts, E embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import micro
from index import gaussian, neighbours
from index.reference import Reference
from micro import world
from pipeline.contract import Row
from stages.engine.solver import Occupancy
from stages.models import clip
from stages.ovi.context import Context
from stages.ovi.methods import build
from stages.ovi.settings import PromptMethod

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[2] / "docs" / "figures"
_ALONE = 0.35  # the share of single objects among the world's scenes


@dataclass(frozen=True)
class Asked:
    """Prompts with the embeddings of true pictures of them."""

    prompts: list[str]
    true_BE: torch.Tensor


@dataclass(frozen=True)
class World:
    """Loaded once a benchmark. `bank_NE` are raw image embeddings of training pictures."""

    context: Context
    images: clip.ImageEncoder
    bank_NE: np.ndarray


def reference_of(bank_NE: np.ndarray) -> Reference:
    """A reference in memory, searched exactly."""
    import faiss

    flat = faiss.IndexFlatIP(bank_NE.shape[1])
    flat.add(neighbours.unit(bank_NE))
    index = neighbours.Index(flat, bank_NE, 1, {})
    return Reference(
        Path(), {"rows": len(bank_NE), "dim": bank_NE.shape[1]}, gaussian.fit(gaussian.moments(bank_NE)), index, "cpu"
    )


def pictures(scenes: Sequence[world.Scene]) -> list[np.ndarray]:
    return [world.render(scene) for scene in scenes]


def embed(images: clip.ImageEncoder, scenes: Sequence[world.Scene]) -> np.ndarray:
    from PIL import Image

    return images([Image.fromarray(picture) for picture in pictures(scenes)]).numpy()


def open_world(model: str | None = None, rows: int = 20_000, cache: Path | None = None, seed: int = 0) -> World:
    """Load the encoders and the bank.

    Args:
        model: Prior pipeline; None: the shipped miniature.
        rows: Bank rows, the world's first training pictures behind the rare ones at its beginning.
        cache: File that keeps the bank's embeddings between runs.
    """
    model = model or str(micro.MODELS / "prior")
    text, images = clip.TextEncoder(model), clip.ImageEncoder(model)
    if cache is not None and cache.exists():
        bank_NE = np.load(cache)[:rows]
    else:
        parts = [
            embed(images, [world.sample_scene(i) for i in range(start, min(start + 500, rows))])
            for start in range(0, rows, 500)
        ]
        bank_NE = np.concatenate(parts)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, bank_NE)
    context = Context(
        model=model, revision=None, device="cpu", seed=seed, vision=lambda: images.model, text=text,
        reference=reference_of(bank_NE),
    )  # fmt: skip
    return World(context, images, bank_NE)


def asked(setting: World, kind: str, count: int) -> Asked:
    """Full captions of scenes that are in no bank, with their pictures' embeddings.

    Args:
        kind: ``heldout``: the world's held-out scenes; ``rare``, ``never``: one object of a combination that training
            pictures hold five times, or not once.
    """
    if kind == "heldout":
        scenes = [world.sample_scene(i, "heldout") for i in range(count)]
    else:
        combos = world.combinations(kind)
        rng = np.random.default_rng([7, len(kind)])
        scenes = [world.compose(rng, [combos[int(rng.integers(len(combos)))]]) for _ in range(count)]
    words = np.random.default_rng(0)
    prompts = [world.caption(scene, words, "full") for scene in scenes]
    return Asked(prompts, torch.from_numpy(embed(setting.images, scenes)))


def rows_of(setting: World, prompts: Sequence[str]) -> list[Row]:
    text_BE = setting.context.text(list(prompts))
    return [
        {"id": f"p{i}", "prompt": p, "text": t.numpy()} for i, (p, t) in enumerate(zip(prompts, text_BE, strict=True))
    ]


@dataclass(frozen=True)
class Outcome:
    """What a method did: its rows in the prompts' order, and the seconds of the whole (models loaded before)."""

    rows: list[Row]
    seconds: float
    occupancy: Occupancy | None

    @property
    def z_BE(self) -> torch.Tensor:
        return torch.from_numpy(np.stack([row["embedding"] for row in self.rows]))

    def mean(self, name: str) -> float | None:
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return float(np.mean(values)) if values else None


def run(method: PromptMethod, setting: World, rows: Sequence[Row], seed: int = 0) -> Outcome:
    context = replace(setting.context, seed=seed, occupancy={})
    mapped = build(method, context)
    started = time.perf_counter()
    found = {row["id"]: row for row in mapped(iter(rows))}
    seconds = time.perf_counter() - started
    return Outcome([found[row["id"]] for row in rows], seconds, context.occupancy.get(method.label))


def cosine(a_BE: torch.Tensor, b_BE: torch.Tensor) -> np.ndarray:
    return nn.functional.cosine_similarity(a_BE.float(), b_BE.float(), dim=-1).numpy()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval over the prompts."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def machine() -> str:
    import os
    import platform

    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    return f"{platform.machine()}, {cores}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
