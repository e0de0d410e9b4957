"""Published networks with random weights, made on the device in the type they run in: no file, no copy on the host.

What they compute is meaningless, what it costs is not: sizes, shapes and code are the published ones. ``toy`` gives
networks of the same classes and a few thousand numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.engine.device import exact_float32
from stages.models.families import family_of
from stages.models.flux import Flux
from stages.models.latent import Condition, Geometry, LatentModel
from stages.models.settings import LatentModelSettings
from tests.support import full_size, tiny_flows, tiny_stable_diffusion

VISION: dict[str, dict[str, Any]] = {
    "ViT-L/14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "projection_dim": 768, "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu",
    },
    "ViT-bigG/14": {
        "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16,
        "projection_dim": 1280, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip
"""Image encoders: OpenAI's, and the one of Kandinsky 2.2's prior."""
TOY_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 16,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def drawn(make: Callable[[], Any], device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen network whose weights are drawn where they stay, as its class draws them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = make()
    finally:
        torch.set_default_dtype(before)
    for parameter in network.parameters():  # a class that knows better than the default type
        parameter.data = parameter.data.to(dtype)
    return network.eval().requires_grad_(False)


def drawn_vision(name: str, device: torch.device | str, dtype: torch.dtype, *, toy: bool = False) -> Any:
    """An image encoder of `VISION`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**(TOY_VISION if toy else VISION[name]))
    config.dtype = dtype
    return drawn(lambda: CLIPVisionModelWithProjection(config), device, dtype)


@dataclass(frozen=True)
class Drawn:
    """A `stages.models.latent.Network` of a folder that holds configurations alone."""

    folder: Path
    device: str

    def load(self, kind: Any, dtype: torch.dtype) -> Any:
        if hasattr(kind, "load_config"):
            config = kind.load_config(self.folder)
            return drawn(lambda: kind.from_config(config), self.device, dtype)
        own = kind.config_class.from_pretrained(self.folder)
        own.dtype = dtype
        return drawn(lambda: kind(own), self.device, dtype)

    def identity(self) -> dict[str, str]:
        return {"path": str(self.folder), "revision": "", "fingerprint": "drawn at random"}


def folder_of(kind: str, scratch: Path, *, toy: bool = False) -> Path:
    """A model's folder without weights: ``sd15``, ``sdxl`` or ``flux``."""
    folder = scratch / f"{kind}{'-toy' if toy else ''}"
    if (folder / "model_index.json").exists():
        return folder
    if toy and kind == "flux":
        tiny_flows.build(folder, "flux-dev")
    elif toy:
        tiny_stable_diffusion.build(folder, "sdxl" if kind == "sdxl" else "sd")
    elif kind == "flux":
        full_size.write_flow_configs("FLUX.1-dev", folder)
    else:
        full_size.write_configs(kind, folder, tiny_stable_diffusion.tokenizer(77))
    return folder


def latent_model(settings: LatentModelSettings) -> LatentModel:
    """The model of a folder of `folder_of`, as its family loads it, but for the weights. Of FLUX, transformer and
    autoencoder alone."""
    exact_float32(settings.dtype == "float32")
    family: Any = family_of(settings)
    geometry: Geometry = family.read_geometry(settings)
    folder = Path(settings.model)
    parts = {part: Drawn(folder / part, settings.device) for part in geometry.parts}
    if family is not Flux:
        return family.load(settings, replace(geometry, parts=parts))
    import diffusers

    geometry = replace(geometry, parts={part: parts[part] for part in ("transformer", "vae")})
    index = json.loads((folder / "model_index.json").read_text())
    networks = {
        part: parts[part].load(
            getattr(diffusers, index[part][1]), torch.float32 if part == "vae" else getattr(torch, settings.dtype)
        )
        for part in geometry.parts
    }
    return Flux(SimpleNamespace(**networks), geometry)


def condition_of(model: LatentModel, rows: int) -> Condition:
    """A condition of so many rows: of one prompt, or, where no text encoder was loaded, random numbers."""
    if isinstance(model, Flux):
        width = int(model.transformer.config.pooled_projection_dim)
        text = torch.randn(rows, *model.geometry.text_shape, device=model.device)
        return {"text_BLE": text, "pooled_BE": torch.randn(rows, width, device=model.device)}
    return model.condition(["photo of a robot"] * rows)
