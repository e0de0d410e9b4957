"""Checkpoints of long work on one row or one model: small safetensors files that are whole or absent.

They are no part of a dataset: whatever is read from one could be computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.access import filesystem as filesystem_of

if TYPE_CHECKING:
    import torch


def write_checkpoint(path: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path` (local, or any fsspec address) in one go.

    Args:
        path: File; its folder is created.
        tensors: Copied to the CPU.
        meta: JSON-able.
    """
    from safetensors.torch import save

    data = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata={"state": json.dumps(meta)})
    filesystem, target = filesystem_of(path)
    if "file" not in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        filesystem.pipe_file(target, data)  # one PUT
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    scratch = f"{target}.{uuid4().hex[:8]}.part"
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, target)


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and meta of a checkpoint; None where there is none, or none that can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    filesystem, target = filesystem_of(path)
    try:
        data: bytes = filesystem.cat_file(target)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load(data), json.loads(header["__metadata__"]["state"])
    except (FileNotFoundError, SafetensorError, ValueError, KeyError):
        return None
