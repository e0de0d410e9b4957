"""Which family of latent models a folder belongs to, and opening it."""

from __future__ import annotations

from stages.engine.device import chosen_devices, exact_float32
from stages.models.chroma import Chroma
from stages.models.compiled import check_compiler, compile_blocks
from stages.models.files import INDEX, read_config
from stages.models.flux import Flux
from stages.models.flux2 import Flux2, Flux2Klein
from stages.models.latent import Geometry, LatentModel
from stages.models.origin import configuration
from stages.models.ovis_image import OvisImage
from stages.models.qwen_image import QwenImage
from stages.models.qwen_image_21 import QwenImage21
from stages.models.sd3 import StableDiffusion3
from stages.models.settings import LatentModelSettings, SamplingSettings
from stages.models.transformer import FlowTransformer
from stages.models.unet import StableDiffusion, StableDiffusionXL
from stages.models.z_image import ZImage

UNETS = (StableDiffusionXL, StableDiffusion)
"""The first whose pipelines' name the folder's index begins with."""
CONSISTENCY = "LatentConsistencyModelPipeline"
"""Of a Stable Diffusion whose own pipeline runs `LCMScheduler` alone; Stable Diffusion's runs it with any."""
FLOWS: dict[str, type[FlowTransformer]] = {
    family.index: family
    for family in (StableDiffusion3, Flux, Chroma, Flux2, Flux2Klein, QwenImage, QwenImage21, ZImage, OvisImage)
}
"""By the class of the pipeline."""


def family_of(settings: LatentModelSettings) -> type[StableDiffusion] | type[FlowTransformer]:
    """The class of models that a folder's belongs to.

    Raises:
        ValueError: It is of no known family, or cannot be read.
    """
    path = settings.model
    where, revision = configuration(settings)
    try:
        index = read_config(where, INDEX, revision=revision)
    except OSError as error:
        if where != path:
            raise ValueError(
                f"model {path!r} is one file, without its configuration, and that of {where!r}, which fits, is not to "
                f"be had: set `config` to a folder or hub id of such a model ({str(error).splitlines()[0]})"
            ) from error
        raise ValueError(
            f"model {path!r} is no diffusers folder or hub id with a denoiser, a VAE and a scheduler: "
            f"{str(error).splitlines()[0]}"
        ) from error
    pipeline = str(index.get("_class_name"))
    if pipeline in FLOWS:
        return FLOWS[pipeline]
    if pipeline == CONSISTENCY:
        return StableDiffusion
    for family in UNETS:
        if pipeline.startswith(family.index) and not pipeline.startswith("StableDiffusion3"):
            return family
    raise ValueError(
        f"model {path!r} is a {pipeline}; inversion knows Stable Diffusion 1.x, 2.x, SDXL and {', '.join(FLOWS)}"
    )


def read_geometry(settings: LatentModelSettings) -> Geometry:
    """Read a model's configuration; loads no weights.

    Raises:
        ValueError: No model of a known family, or settings that do not fit it.
    """
    return family_of(settings).read_geometry(settings)


def open_without_weights(settings: LatentModelSettings) -> LatentModel:
    """A model on the meta device, which says what a row takes (`stages.models.memory`) and can do nothing else.

    Raises:
        ValueError: No model of a known family, or settings that do not fit it.
    """
    family = family_of(settings)
    return family.without_weights(settings, family.read_geometry(settings))


def open_latent_model(settings: LatentModelSettings) -> LatentModel:
    """Load a model, frozen, onto its device. What stays float32 beside networks in half precision (the autoencoder) may
    be rounded to TF32 there; networks in float32 are not.

    Raises:
        ValueError: No model of a known family, or settings that do not fit it; or it is to be compiled and cannot be.
    """
    exact_float32(settings.dtype == "float32")
    family = family_of(settings)
    geometry = family.read_geometry(settings)
    compiled = isinstance(settings, SamplingSettings) and settings.accelerate == "compile"
    if compiled:  # before the weights are read, which takes minutes
        devices = chosen_devices(settings.device)
        if geometry.grid is not None and len(devices) > 1:
            raise ValueError(
                f"accelerate: compile takes one card a worker, and model {settings.model!r} would lie on "
                f"{', '.join(devices)}: leave it out, or set `resources: {{gpus: 1}}`"
            )
        check_compiler(devices[0])
    model: LatentModel = family.load(settings, geometry)
    if compiled:
        compile_blocks(getattr(model, next(iter(geometry.parts))))
    return model
