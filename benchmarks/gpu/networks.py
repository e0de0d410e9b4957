"""Published networks with random weights, made on the device in the type they run in: no file, no copy on the host.

What they compute is meaningless, what it costs is not: sizes, shapes and code are the published ones. ``toy`` gives
networks of the same classes and a few thousand numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.engine.device import exact_float32
from stages.models.families import family_of
from stages.models.latent import Condition, Geometry, LatentModel
from stages.models.settings import LatentModelSettings
from stages.models.transformer import FlowTransformer
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
FLOWS: dict[str, str] = {
    "FLUX.1-dev": "flux-dev", "SD3.5-medium": "sd35-medium", "SD3.5-large": "sd35-large",
    "FLUX.2-klein-4B": "flux2-klein", "Z-Image-Turbo": "z-image", "Chroma1-HD": "chroma", "Qwen-Image": "qwen-image",
    "Ovis-Image-7B": "ovis-image", "Qwen-Image-2.1": "qwen-image-21",
}  # fmt: skip
"""Rectified flows by their names in `tests.support.full_size`, and their toys' in `tests.support.tiny_flows`."""
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
    """A model's folder without weights: ``sd15``, ``sdxl`` or one of `FLOWS`."""
    folder = scratch / f"{kind}{'-toy' if toy else ''}"
    if (folder / "model_index.json").exists():
        return folder
    if toy and kind in FLOWS:
        tiny_flows.build(folder, FLOWS[kind])
    elif toy:
        tiny_stable_diffusion.build(folder, "sdxl" if kind == "sdxl" else "sd")
    elif kind in FLOWS:
        full_size.write_flow_configs(kind, folder)
    else:
        full_size.write_configs(kind, folder, tiny_stable_diffusion.tokenizer(77))
    return folder


def latent_model(settings: LatentModelSettings) -> LatentModel:
    """The model of a folder of `folder_of`, as its family loads it, but for the weights. Of a rectified flow,
    transformer and autoencoder alone."""
    exact_float32(settings.dtype == "float32")
    family: Any = family_of(settings)
    geometry: Geometry = family.read_geometry(settings)
    folder = Path(settings.model)
    parts = {part: Drawn(folder / part, settings.device) for part in geometry.parts}
    if not issubclass(family, FlowTransformer):
        return family.load(settings, replace(geometry, parts=parts))
    import diffusers

    kinds = {"transformer": (family.transformer_class, settings.dtype), "vae": (family.vae_class, "float32")}
    networks = {
        part: parts[part].load(getattr(diffusers, kind), getattr(torch, dtype)) for part, (kind, dtype) in kinds.items()
    }
    return family(SimpleNamespace(**networks), replace(geometry, parts={part: parts[part] for part in kinds}))


def condition_of(model: LatentModel, rows: int) -> Condition:
    """A condition of so many rows: of one prompt, or, where no text encoder was loaded, random numbers in texts as long
    as they can be."""
    if not isinstance(model, FlowTransformer):
        return model.condition(["photo of a robot"] * rows)
    return {
        name: torch.ones(rows, *one.shape[1:], dtype=torch.bool, device=model.device)
        if one.dtype == torch.bool
        else torch.randn(rows, *one.shape[1:], device=model.device)
        for name, one in model.blank_condition().items()
    }
