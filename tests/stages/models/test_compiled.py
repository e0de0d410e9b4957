"""Denoisers with compiled blocks: what they give is what they gave, one graph serves all layers of a kind, gradients go
through the blocks as they are, and a machine that cannot compile is told so."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models import compiled
from stages.models.compiled import compile_blocks, repeated_blocks
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.settings import SamplingSettings
from tests.support.tiny_families import KINDS, build


class Traced:
    """Stands for the compiler: runs what was traced, and counts it."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    torch._dynamo.reset()
    found = Traced()
    monkeypatch.setattr(compiled.torch, "compile", partial(torch.compile, backend=found))
    return found


def opened(folder: Path, kind: str, **options: Any) -> LatentModel:
    settings = SamplingSettings(model=build(folder, kind), device="cpu", **options)
    return open_latent_model(settings).at(32, 32)


def network_of(model: Any) -> Any:
    return model.unet if hasattr(model, "unet") else model.transformer


def passes(model: LatentModel, rows: int = 3) -> torch.Tensor:
    z_BCHW = torch.randn(rows, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = model.condition(["a star", "a hill", "a red star"][:rows])
    with torch.no_grad():
        return model.predictor()(z_BCHW, torch.tensor([500, 20, 800])[:rows], condition)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gives_what_it_gave(tmp_path: Path, traced: Traced, kind: str) -> None:
    model = opened(tmp_path, kind)
    before = passes(model)
    compile_blocks(network_of(model))
    blocks = list(repeated_blocks(network_of(model)))
    assert blocks
    at_first = len(traced.graphs)
    torch.testing.assert_close(passes(model), before, rtol=1e-5, atol=1e-6)
    assert len(traced.graphs) > at_first
    torch.testing.assert_close(passes(model, 2), before[:2], rtol=1e-4, atol=1e-5)


def test_a_graph_serves_all_layers_that_are_alike_and_two_all_numbers_of_rows(traced: Traced) -> None:
    model = open_latent_model(SamplingSettings(model="micro:flux", device="cpu"))
    network = network_of(model)
    assert (len(network.transformer_blocks), len(network.single_transformer_blocks)) == (1, 5)
    one = passes(model, 1)
    compile_blocks(network)
    traced.graphs.clear()
    passes(model)
    assert len(traced.graphs) == 3  # the first of the five gets its input laid out otherwise than the others
    for rows in (2, 3, 2):
        passes(model, rows)
    assert len(traced.graphs) == 6
    torch.testing.assert_close(passes(model, 1), one, rtol=1e-4, atol=1e-5)
    assert len(traced.graphs) <= 9


def test_a_gradient_goes_through_the_blocks_as_they_are(tmp_path: Path, traced: Traced) -> None:
    model = opened(tmp_path, "sd")
    z_BCHW = torch.randn(1, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = model.condition(["a star"])

    def slope() -> torch.Tensor:
        x_BCHW = z_BCHW.clone().requires_grad_()
        with torch.enable_grad():
            made = model.predictor()(x_BCHW, torch.tensor([500]), condition)
            return torch.autograd.grad(made.square().sum(), x_BCHW)[0]

    before = slope()
    compile_blocks(network_of(model))
    traced.graphs.clear()
    assert torch.equal(slope(), before)
    assert model.recompute("predict")
    assert torch.equal(slope(), before)
    assert not traced.graphs


def test_more_shapes_than_pytorch_would_compile_for_in_any_thread(traced: Traced) -> None:
    class Network(nn.Module):
        _repeated_blocks = ("Linear",)
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for width in range(2, 22))

        def forward(self) -> None:
            for layer in self.layers:
                layer(torch.ones(3, layer.in_features))

    network = Network().requires_grad_(False)
    compile_blocks(network)
    traced.graphs.clear()
    thread = threading.Thread(target=torch.no_grad()(network))
    thread.start()
    thread.join()
    assert len(traced.graphs) == 20


def test_it_takes_one_card(tmp_path: Path) -> None:
    settings = SamplingSettings(model=build(tmp_path, "flux-dev"), device="cpu,cpu", accelerate="compile")
    with pytest.raises(ValueError, match=r"accelerate: compile takes one card a worker.*would lie on cpu, cpu"):
        open_latent_model(settings)


def test_a_job_compiles_and_finds_the_same_seeds(tmp_path: Path) -> None:
    """By the real compiler."""
    folder = build(tmp_path, "flux-dev")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    given = [{"id": "a", "image": Image.fromarray(pixels), "prompt": "a star"}]
    found = []
    for accelerate in (None, "compile"):
        settings = InvertImagesSettings(
            model=folder, device="cpu", accelerate=accelerate, steps=4, methods=[{"method": "lbo"}], pictures=False
        )
        (row,) = InvertImages(settings)([dict(one) for one in given])
        assert row["status"] == "ok", row["error"]
        found.append(row)
    np.testing.assert_allclose(found[1]["latent"], found[0]["latent"], rtol=0, atol=0.05)
    assert found[1]["psnr"] == pytest.approx(found[0]["psnr"], abs=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sd", "flux-dev"])
def test_compiled_passes_equal_eager_ones_on_a_gpu(tmp_path: Path, kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    folder = build(tmp_path, kind)
    plain, fast = (
        open_latent_model(SamplingSettings(model=folder, device="cuda", accelerate=how)).at(32, 32)
        for how in (None, "compile")
    )
    for rows in (3, 2, 1):
        z_BCHW = torch.randn(rows, *plain.geometry.latent_shape, device="cuda")
        t_B, condition = torch.full((rows,), 500, device="cuda"), plain.condition(["a star"] * rows)
        with torch.no_grad():
            expected = plain.predictor()(z_BCHW, t_B, condition)
            torch.testing.assert_close(fast.predictor()(z_BCHW, t_B, condition), expected, rtol=1e-3, atol=1e-4)


def test_a_machine_that_cannot_compile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("No working C++ compiler found\nand much more")

        return run

    monkeypatch.setattr(compiled.torch, "compile", failing)
    said = r"accelerate: compile: PyTorch cannot compile for cpu .*No working C\+\+ compiler found\)"
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, "sd", accelerate="compile")


def test_plans_without_it_stay_what_they_were() -> None:
    assert "accelerate" not in SamplingSettings().model_dump()
    assert SamplingSettings(accelerate="compile").model_dump()["accelerate"] == "compile"
