"""Checkpoints of one file, the form in which most community models are passed on: all networks under their original
names, and no configuration, which comes from the model that it was trained from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.models.copies import here
from stages.models.files import files_of, sha256
from stages.models.fingerprint import digest, telling

UNET = ("model.diffusion_model.",)
VAE = ("first_stage_model.", "vae.")
TEXT = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def is_one_file(model: str) -> bool:
    """Whether a model's name is that of a checkpoint instead of a folder or hub id."""
    return model.endswith(".safetensors")


def configuration_of(file: str) -> str:
    """The hub id of the model that a checkpoint was trained from, by its shapes (diffusers' own table).

    Raises:
        ValueError: It is no checkpoint of Stable Diffusion.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = _shapes(file)
    if not any(key.startswith(UNET) for key in shapes):
        held = "a LoRA belongs in `loras`" if any("lora" in key for key in shapes) else "its keys are of another kind"
        raise ValueError(f"model {file!r} is no checkpoint of Stable Diffusion ({held})")
    return str(fetch_diffusers_config(_Shapes(shapes))["pretrained_model_name_or_path"])


@lru_cache(maxsize=16)
def _shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape, from the file's header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        there = Path(here(file))
    except OSError as error:
        raise ValueError(str(error)) from None
    if not there.is_file():
        raise ValueError(f"there is no file {file}")
    try:
        with safe_open(there, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None


class _Shapes(Mapping[str, Any]):
    """Shapes in the place of tensors."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, key: str) -> Any:
        return SimpleNamespace(shape=self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def check_parts(file: str, own_vae: bool) -> None:
    """Refuse a checkpoint that lacks a network.

    Args:
        own_vae: Its own autoencoder is needed.

    Raises:
        ValueError: It lacks one.
    """
    keys = _shapes(file)
    if not any(key.startswith(TEXT) for key in keys):
        raise ValueError(f"model {file!r} holds no text encoder, but a U-Net alone: take a full checkpoint")
    if own_vae and not any(key.startswith(VAE) for key in keys):
        raise ValueError(f"model {file!r} holds no autoencoder: name one with `vae`")


@dataclass(frozen=True)
class FilePart:
    """A network inside a checkpoint; takes the place of `stages.models.latent.Place`.

    Attributes:
        file: The checkpoint.
        config: Folder or hub id of the configuration.
        part: Its name there.
    """

    file: str
    config: str
    part: str

    def load(self, kind: Any, dtype: torch.dtype, **options: Any) -> Any:
        """The network, of a class of diffusers; `options` of its `from_single_file`."""
        return kind.from_single_file(
            here(self.file), config=here(self.config), subfolder=self.part, dtype=dtype, **options
        )

    def identity(self) -> dict[str, str]:
        """Path, revision and fingerprint: of the whole file, and of this network's configuration."""
        config = json.loads(files_of(self.config, None, self.part).text("config.json"))
        return {
            "path": self.file,
            "revision": "",
            "fingerprint": digest([telling(config), [sha256(Path(here(self.file)))]]),
        }
