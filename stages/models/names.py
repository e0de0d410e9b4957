"""Names of models and folders in settings: paths that mean the same in every process, hub ids, shipped models."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from pipeline.addresses import has_password, shown
from pipeline.extras import miniature

SHIPPED = ("prior", "decoder", "stable-diffusion", "flux", "flux-schnell", "sd3", "oracle")


def shipped(name: str) -> str:
    """The folder of a shipped model that is given as ``micro:NAME``; any other name as it is.

    Raises:
        MissingExtra: The shipped models are not installed.
        ValueError: There is none of that name.
    """
    prefix, _, model = name.partition(":")
    if prefix != "micro":
        return name
    if model not in SHIPPED:
        raise ValueError(f"no shipped model is called {model!r}. Shipped: {', '.join(SHIPPED)}")
    with miniature():
        from micro import MODELS

    return str(MODELS / model)


def _model(name: str) -> str:
    """A path that is there, made absolute: a worker may run in another folder, and find another model of that name
    there. Hub ids, addresses and what is not there stay as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if path != name or os.path.exists(path) else name


def _without_password(name: str) -> str:
    """Names go into plans and cards."""
    if has_password(name):
        raise ValueError(f"{shown(name)}: holds a password; write it into `storage_options`")
    return name


def _folder(name: str) -> str:
    """A path made absolute, whether or not it is there already; addresses, and a chain's ``${step}``, as they are."""
    return name if "://" in name or name.startswith("${") else os.path.abspath(os.path.expanduser(name))


_DEVICE = re.compile(r"(?!(?:gpu|tpu)\b)[a-z]+(:\d+)?")
"""What may be one to PyTorch, whose list others add theirs to; two words that people try are none of it."""


def _device(name: str) -> str:
    if name != "auto" and not all(_DEVICE.fullmatch(part.strip()) for part in name.split(",")):
        raise ValueError(f"{name!r} is no device: write auto, cpu, cuda, cuda:1, mps, or several as cuda:0,cuda:1")
    return name


ModelName = Annotated[str, AfterValidator(shipped), AfterValidator(_model), AfterValidator(_without_password)]
"""Path, hub id or address of a model, or ``micro:NAME`` for a shipped one, found from any working directory."""
DeviceName = Annotated[str, AfterValidator(_device)]
"""PyTorch's name of a device, several with commas between them, or ``auto``."""
FolderName = Annotated[str, AfterValidator(_folder)]
"""Path or address of a folder: another job's output, or where pictures lie."""
