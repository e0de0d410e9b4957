"""Names of models in settings: a folder, a hub id, or a shipped one."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

import micro

SHIPPED = ("prior", "decoder", "stable-diffusion", "oracle")


def _shipped(name: str) -> str:
    """The folder of a shipped model that is given as ``micro:NAME``; any other name as it is."""
    prefix, _, model = name.partition(":")
    if prefix != "micro":
        return name
    if model not in SHIPPED:
        raise ValueError(f"no shipped model is called {model!r}. Shipped: {', '.join(SHIPPED)}")
    return str(micro.MODELS / model)


ModelName = Annotated[str, AfterValidator(_shipped)]
"""Folder or hub id of a model, or ``micro:NAME`` for a shipped one, which is found from any working directory."""
