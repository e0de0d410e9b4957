"""Every method on a GPU against the same on the CPU, on networks of a few thousand random numbers.

The two devices add in another order: in float32 latents agree to about 1e-3 after a few steps, in bfloat16 rows only
have to come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.engine.room import Room
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from tests.support import tiny_flows, tiny_kandinsky, tiny_stable_diffusion
from tests.support.concepts import concept_row, stage_of
from tests.support.rare import picture, rows, settings

DEVICE = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
METHODS: list[dict[str, Any]] = [
    {"method": "ddim"},
    {"method": "fixed-point", "iterations": 3},
    {"method": "lbo", "tolerance": 1e-5, "passes": 12},
    {"method": "lbo", "name": "boosted", "ilb": {"steps": 4, "warmup": 1}},
    {"method": "belm"},
    {"method": "null-text", "iterations": 2},
]
LABELS = [method.get("name", method["method"]) for method in METHODS]


@pytest.fixture(scope="module", autouse=True)
def exact() -> Any:
    """No TF32: ten bits of a product are not enough to compare."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def inverted(folder: str, device: str, methods: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    told = InvertImagesSettings(model=folder, methods=methods, device=device, steps=4, **options)
    given = [
        {"id": f"{i}/{method.label}", "image": picture(i), "prompt": "red star", "method": method.label}
        for method in told.methods
        for i in range(3)
    ]
    return {row["id"]: row for row in InvertImages(told)(given)}


def agree(ours: dict[str, Any], theirs: dict[str, Any], name: str, close: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row["status"] == "ok", (key, row["error"])
        size = np.abs(theirs[key][name]).max()
        assert np.abs(row[name] - theirs[key][name]).max() <= close * size, key


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_inversion_gives_what_it_gives_on_the_cpu(tmp_path: Path, kind: str, guidance: float) -> None:
    folder = tiny_stable_diffusion.build(tmp_path, kind)
    both = [inverted(folder, device, METHODS, guidance=guidance, slots=2) for device in (DEVICE, "cpu")]
    agree(*both, "latent", 5e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["sd35-medium", "flux-dev"])
def test_a_rectified_flow_gives_what_it_gives_on_the_cpu(tmp_path: Path, kind: str) -> None:
    folder = tiny_flows.build(tmp_path, kind)
    both = [inverted(folder, device, [{"method": "euler"}, {"method": "lbo"}]) for device in (DEVICE, "cpu")]
    agree(*both, "latent", 5e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_with_slots_that_memory_tells(tmp_path: Path, dtype: str) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    done = inverted(folder, DEVICE, METHODS, dtype=dtype)
    assert {row["status"] for row in done.values()} == {"ok"}, [row["error"] for row in done.values()]


@pytest.mark.gpu
@needs_gpu
def test_words_are_learned_as_on_the_cpu(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    given = [concept_row(i) for i in range(3)]
    both = []
    for device in (DEVICE, "cpu"):
        stage = stage_of(folder, settings={"steps": 4, "window": 2}, slots=2, device=device)
        both.append({row["id"]: row for row in stage(given)})
    agree(*both, "embeddings", 1e-2)


@pytest.mark.gpu
@needs_gpu
def test_seeds_are_selected_as_on_the_cpu(tmp_path: Path) -> None:
    from stages.rare.stage import RareConcepts

    folder = tiny_stable_diffusion.build(tmp_path / "model")
    clip = tiny_kandinsky.build_prior(tmp_path / "clip")
    method = {"method": "seed-select", "iterations": 2, "steps": 3}
    both = []
    for device in (DEVICE, "cpu"):
        told = settings(folder, clip, [method], device=device)
        both.append({row["id"]: row for row in RareConcepts(told)(rows(["seed-select"]))})
    agree(*both, "latent", 2e-2)


@pytest.mark.gpu
@needs_gpu
def test_a_device_that_is_too_small_gets_a_batch_in_parts() -> None:
    """With the allocator's own limit: 256 MB beside what is held, for a batch that makes 1 GB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + (256 << 20)
    x_BC = torch.ones(64, 1 << 10, device="cuda")
    room, given = Room(), list[int]()

    def network(part_BC: torch.Tensor) -> torch.Tensor:
        given.append(len(part_BC))
        return part_BC.repeat(1, 1 << 12)[:, :8].contiguous()

    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        assert room(network, x_BC).shape == (64, 8)
        first = len(given)
        room(network, x_BC)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert given[0] == 64
    assert room.rows < 64
    assert max(given[first:]) == room.rows


@pytest.mark.gpu
@needs_gpu
def test_the_free_memory_of_the_device_tells_how_many_rows_fit(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    model = open_latent_model(InvertImagesSettings(model=folder, device=DEVICE))
    told = {work: model.rooms[work].rows for work in ("predict", "gradient", "decode", "boost")}
    assert told["predict"] > told["gradient"] > 1000
    assert told["decode"] > told["boost"] > 1000
