"""Which family of latent models a folder belongs to, and opening it."""

from __future__ import annotations

from stages.models.latent import Geometry, LatentModel
from stages.models.settings import LatentModelSettings
from stages.models.unet import StableDiffusion, StableDiffusionXL

FAMILIES = (StableDiffusionXL, StableDiffusion)
"""The first whose pipelines' name the folder's index begins with."""


def _family(settings: LatentModelSettings) -> type[StableDiffusion]:
    from diffusers import DiffusionPipeline

    path = settings.model
    try:
        index = DiffusionPipeline.load_config(path, revision=settings.revision)
    except OSError as error:
        raise ValueError(
            f"model {path!r} is no diffusers folder or hub id with a U-Net, a VAE and a scheduler: "
            f"{str(error).splitlines()[0]}"
        ) from error
    pipeline = str(index.get("_class_name"))
    for family in FAMILIES:
        if pipeline.startswith(family.index):
            return family
    raise ValueError(f"model {path!r} is a {pipeline}; inversion knows Stable Diffusion 1.x, 2.x and SDXL")


def read_geometry(settings: LatentModelSettings) -> Geometry:
    """Read a model's configuration; loads no weights.

    Raises:
        ValueError: No model of a known family, or settings that do not fit it.
    """
    return _family(settings).read_geometry(settings)


def open_latent_model(settings: LatentModelSettings) -> LatentModel:
    """Load a model, frozen, onto its device.

    Raises:
        ValueError: No model of a known family, or settings that do not fit it.
    """
    family = _family(settings)
    return family.load(settings, family.read_geometry(settings))
