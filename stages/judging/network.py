"""Classifiers, by name.

Legend: B pictures, C H W; D values of all heads side by side.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import cast

from torch import nn

WIDTHS = (32, 64, 128, 128)
AUXILIARY = ("googlenet", "inception_v3")
"""torchvision's that give more than one output while they are trained."""


def small(outputs: int) -> nn.Module:
    """Four convolutions of stride 2, each with batch norm and ReLU; the mean over the picture; one linear layer (ours).

    A picture of any side from 8 pixels on.
    """
    layers: list[nn.Module] = []
    for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
        kernel = 5 if before == 3 else 3
        layers += [
            nn.Conv2d(before, width, kernel, stride=2, padding=kernel // 2, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], outputs))


def check(name: str) -> None:
    """Refuse a classifier that this installation lacks.

    Raises:
        ValueError: The library is not installed, does not fit this torch, or has no such model.
    """
    library, _, model = name.partition("/")
    if name == "small":
        return
    if find_spec(library) is None:
        raise ValueError(f"classifier: {name} needs {library}, which is not installed: pip install {library}")
    try:
        known = _known(library)
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch, it fails in any of these ways
        raise ValueError(f"classifier: {library} cannot be loaded ({error}); install the one that fits torch") from None
    if model not in known:
        raise ValueError(f"classifier: {library} has no model {model!r}; its list_models() tells which there are")


def _known(library: str) -> list[str]:
    if library == "torchvision":
        from torchvision import models

        return [name for name in models.list_models(module=models) if name not in AUXILIARY]  # no detectors
    from timm import list_models

    return cast(list[str], list_models())


def build(name: str, outputs: int) -> nn.Module:
    """A classifier with fresh weights, drawn from torch's own generator: x_BCHW in [-1, 1] -> (B, D)."""
    library, _, model = name.partition("/")
    if name == "small":
        return small(outputs)
    if library == "torchvision":
        from torchvision.models import get_model

        return cast(nn.Module, get_model(model, weights=None, num_classes=outputs))
    from timm import create_model

    return cast(nn.Module, create_model(model, pretrained=False, num_classes=outputs))
