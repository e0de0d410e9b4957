"""The smallest job of each kind that still has several shards: miniature models, a few rows, a few steps."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from micro.world import render, sample_scene
from tests.support import tiny_captioners

EXAMPLES = Path(__file__).parents[3] / "jobs/examples"
CONCEPTS = 4
WIDTH = 16
"""Of embeddings that were made elsewhere."""
MICRO_WIDTH = 128
"""Of the miniature decoder's."""


def adopted(folder: Path) -> dict[str, Any]:
    """A reference of embeddings that lie in a file: the only kind whose workers need no network."""
    rng = np.random.default_rng(0)
    np.save(folder / "made-elsewhere.npy", rng.standard_normal((96, WIDTH)).astype(np.float32))
    return {
        "job": "reference", "input": str(folder / "made-elsewhere.npy"), "given": "embeddings", "dim": WIDTH,
        "shard_rows": 8,
    }  # fmt: skip


def reference(folder: Path) -> dict[str, Any]:
    return {
        "job": "reference", "input": "micro-world://train?rows=48&seed=0", "encoder": "micro:prior",
        "keep": ["caption"], "shard_rows": 6,
    }  # fmt: skip


def invert_prompts(folder: Path) -> dict[str, Any]:
    """Needs a finished `reference`."""
    lines = (EXAMPLES / "quickstart/prompts.jsonl").read_text().splitlines()[:10]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    methods = ["text-embedding", {"method": "ovi", "compact": True, "steps": 8}, {"method": "retrieval", "k": 2}]
    return {
        "job": "invert-prompts", "input": str(folder / "prompts.jsonl"), "encoder": "micro:prior", "methods": methods,
        "reference": str(folder / "expected/reference"), "shard_rows": 5,
        "decode": {"model": "micro:decoder", "steps": 2}, "score": ["clip"],
    }  # fmt: skip


def invert_images(folder: Path) -> dict[str, Any]:
    return {
        "job": "invert-images", "model": "micro:stable-diffusion", "steps": 3, "shard_rows": 4,
        "input": {"path": str(EXAMPLES / "quickstart/world.jsonl"), "images": ["image"]},
        "methods": ["ddim", "fixed-point", "lbo"],
    }  # fmt: skip


def learn_concepts(folder: Path) -> dict[str, Any]:
    for number in range(CONCEPTS):
        shutil.copytree(
            EXAMPLES / "quickstart/concepts/stippled", folder / f"concepts/stippled-{number}", dirs_exist_ok=True
        )
    return {
        "job": "learn-concepts", "input": str(folder / "concepts"), "model": "micro:stable-diffusion",
        "learning": {"steps": 12, "window": 4, "lr": 0.02, "context": "none"}, "checkpoint_seconds": 0.2,
        "samples": {"subjects": ["blue star"], "prompt": "a {concept} {subject}", "draws": 1, "steps": 2},
        "shard_rows": 2,
    }  # fmt: skip


def rare_concepts(folder: Path) -> dict[str, Any]:
    return {
        "job": "rare-concepts", "input": str(EXAMPLES / "rare-concepts"), "model": "micro:stable-diffusion",
        "encoder": "micro:prior", "methods": ["random", "slerp"], "count": 2, "candidates": 1, "score": ["text"],
        "steps": 2, "shard_rows": 4,
    }  # fmt: skip


def train_inverter(folder: Path) -> dict[str, Any]:
    lines = (EXAMPLES / "quickstart/prompts.jsonl").read_text().splitlines()[10:34]
    (folder / "drawn.jsonl").write_text("\n".join(lines))
    return {
        "job": "train-inverter", "input": str(folder / "drawn.jsonl"), "model": "micro:stable-diffusion", "steps": 2,
        "network": {"width": 32, "layers": 1, "heads": 2}, "training": {"steps": 12, "batch_size": 4, "noise_rows": 2},
        "checkpoint_seconds": 0.2, "shard_rows": 4,
    }  # fmt: skip


def invert_text(folder: Path) -> dict[str, Any]:
    """Needs a finished `train_inverter`."""
    return {
        "job": "invert-text", "input": {"path": str(EXAMPLES / "quickstart/world.jsonl"), "images": ["image"]},
        "model": "micro:stable-diffusion", "inverter": str(folder / "expected/train-inverter"), "shard_rows": 2,
    }  # fmt: skip


def decode(folder: Path) -> dict[str, Any]:
    """Embeddings that lie in a file, two pictures of each."""
    rng = np.random.default_rng(1)
    given = rng.standard_normal((16, MICRO_WIDTH))
    np.save(folder / "to-decode.npy", (given / np.linalg.norm(given, axis=1, keepdims=True)).astype(np.float32))
    return {
        "job": "decode", "input": str(folder / "to-decode.npy"), "encoder": "micro:prior", "draws": 2,
        "decode": {"model": "micro:decoder", "steps": 2}, "shard_rows": 6,
    }  # fmt: skip


def write_pictures(path: Path, start: int, count: int) -> str:
    """Pictures of the miniature world, their background being their kind."""
    rows = []
    for number in range(start, start + count):
        scene, file = sample_scene(number, "train", 0), io.BytesIO()
        Image.fromarray(render(scene)).save(file, "PNG")
        rows.append({"id": str(number), "image": {"bytes": file.getvalue(), "path": None}, "kind": scene.background})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def judge_corpus(folder: Path) -> dict[str, Any]:
    """Backgrounds told by classifiers that have seen 12 pictures, and 12 others."""
    more, held_out, real = (
        write_pictures(folder / f"judge-{name}.parquet", start, 12)
        for name, start in (("more", 100), ("held-out", 200), ("real", 300))
    )
    return {
        "job": "judge-corpus", "input": held_out, "real": real, "corpora": {"more": more, "again": more},
        "labels": ["kind"], "size": 16, "epochs": 2, "rare": 2,
    }  # fmt: skip


def select_corpus(folder: Path) -> dict[str, Any]:
    """Of 48 pictures those that differ, of each background."""
    write_pictures(folder / "pool.parquet", 0, 48)
    return {
        "job": "select-corpus", "input": {"path": str(folder / "pool.parquet"), "id": "id"}, "by": "kind",
        "score_column": None, "encoder": "micro:prior", "count": 2, "shard_rows": 6,
    }  # fmt: skip


def caption(folder: Path) -> dict[str, Any]:
    """24 pictures, to words that a LLaVA of random weights draws of them."""
    model = folder / "captioner"
    if not model.exists():
        tiny_captioners.build_llava(model)
    return {
        "job": "caption", "input": {"path": write_pictures(folder / "to-caption.parquet", 0, 24), "id": "id"},
        "model": str(model), "draws": 2, "temperature": 2.0, "max_tokens": 5, "shard_rows": 8,
        "max_failed_fraction": 1.0,
    }  # fmt: skip


def chain(folder: Path) -> dict[str, Any]:
    """A reference, and prompts against it."""
    first, second = reference(folder), invert_prompts(folder)
    return {
        "job": "chain",
        "steps": [
            {**first, "name": "reference", "input": "micro-world://train?rows=24&seed=0"},
            {**second, "name": "prompts", "reference": "${reference}"},
        ],
    }


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "adopted": adopted,
    "reference": reference,
    "invert-prompts": invert_prompts,
    "invert-images": invert_images,
    "learn-concepts": learn_concepts,
    "rare-concepts": rare_concepts,
    "train-inverter": train_inverter,
    "invert-text": invert_text,
    "decode": decode,
    "select-corpus": select_corpus,
    "judge-corpus": judge_corpus,
    "caption": caption,
    "chain": chain,
}
NEEDS = {"invert-prompts": ("reference",), "invert-text": ("train-inverter",)}
"""Kinds whose undisturbed output another kind reads."""


def write(kind: str, folder: Path, workers: int, options: dict[str, Any]) -> Path:
    """The job file of a kind, with what is its own below the folder.

    Args:
        workers: As many at most.
        options: Of the store that its output goes to; empty for a disk.
    """
    job = KINDS[kind](folder)
    job["resources"] = {"workers": {"min": 1, "max": workers}, "cpus": 1, "decode_threads": 1, "encode_threads": 1}
    if options:
        job["storage_options"] = options
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(job, indent=1))
    return path
