"""A random-weight pipeline of any family of latent models."""

from __future__ import annotations

from pathlib import Path

from tests.support import tiny_flows, tiny_stable_diffusion

UNETS = ("sd", "sdxl")
KINDS = ("sd", "sdxl", "sd3", "flux-dev", "chroma", "flux2-dev", "z-image", "qwen-image", "qwen-image-21", "ovis-image")


def build(folder: Path, kind: str) -> str:
    """Its folder."""
    return str((tiny_stable_diffusion if kind in UNETS else tiny_flows).build(folder, kind))
