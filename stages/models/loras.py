"""LoRA adapters (Hu et al., 2022): small updates of a model's layers, added to its weights when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.contract import Settings
from stages.models.copies import brought, here
from stages.models.files import sha256
from stages.models.names import ModelName

FILE = "pytorch_lora_weights.safetensors"
"""What a folder or repository calls it."""


class Lora(Settings):
    """An adapter."""

    path: ModelName
    """A ``.safetensors`` file (diffusers' or kohya's names), a folder or hub id that holds
    ``pytorch_lora_weights.safetensors``, or ``org/name/file.safetensors`` on the hub."""
    weight: float = 1.0
    """How much of it is added."""

    @property
    def file(self) -> Path:
        """Its file on this machine; from the hub it is downloaded once.

        Raises:
            ValueError: There is none.
        """
        try:
            local = Path(here(self.path))
        except OSError as error:
            raise ValueError(f"lora {self.path!r}: {error}") from None
        if local.is_dir():
            local = local / FILE
        if local.is_file() and local.suffix == ".safetensors":
            return local
        if local.is_absolute():
            raise ValueError(f"lora {self.path!r}: there is no safetensors file {local}")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        owner, _, rest = self.path.partition("/")
        name, _, file = rest.partition("/")
        try:
            return Path(hf_hub_download(f"{owner}/{name}", file or FILE))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"lora {self.path!r} is neither here nor on the hub: {reason}") from None

    def mark(self) -> list[Any]:
        """What tells it from any other: its bytes, and how much of it is added."""
        return [sha256(self.file), self.weight]

    def usage(self, target: str) -> str:
        """Lines of Python that add it to a `pipe` of diffusers.

        Args:
            target: What they call the copy of one at an address.
        """
        fetched, path = brought(self.path, target)
        folder, name = (path if fetched else str(self.file.parent)), self.file.name
        if fetched and path != target:  # a file
            folder, name = ".", path
        return "\n".join(
            [
                *fetched, f'pipe.load_lora_weights("{folder}", weight_name="{name}")',
                f"pipe.fuse_lora(lora_scale={self.weight})", "pipe.unload_lora_weights()",
            ]
        )  # fmt: skip


def add_lora(pipeline: Any, lora: Lora) -> None:
    """Add an adapter to a pipeline's weights: W + weight alpha / r B A in each layer that it names.

    Raises:
        ValueError: `peft`, which diffusers leaves this to, is not installed; or the adapter fits no layer.
    """
    try:
        pipeline.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name)
    except ValueError as error:
        if "PEFT" in str(error):
            raise ValueError("`loras` need peft: pip install 'latentmill[lora]'") from None
        raise ValueError(f"lora {lora.path!r} cannot be read: {error}") from None
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"lora {lora.path!r} does not fit this model, it is of another: {reason}") from None
    if not pipeline.get_list_adapters():
        raise ValueError(f"lora {lora.path!r} names no layer of this model: it is of another")
    pipeline.fuse_lora(lora_scale=lora.weight)
    pipeline.unload_lora_weights()
