"""Where the networks of a latent model come from: a folder or hub id, a checkpoint of one file, another autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from stages.models import quantized
from stages.models.copies import brought, here
from stages.models.files import read_config
from stages.models.latent import Network, Place
from stages.models.one_file import FilePart, check_parts, configuration_of, is_one_file
from stages.models.settings import LatentModelSettings
from stages.models.weights import WeightsError, weights_of

LATENT_SPACE = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None,
                "latents_std": None}  # fmt: skip
"""What two autoencoders must have in common to serve one U-Net, with `AutoencoderKL`'s defaults."""


def config_of_vae(path: str) -> tuple[dict[str, Any], str]:
    """An autoencoder's configuration, and where it lies: on top (""), or in a pipeline's folder ``vae``."""
    for folder in ("", "vae"):
        try:
            return read_config(path, folder=folder), folder
        except OSError as error:
            reason = str(error).splitlines()[0]
    raise ValueError(f"vae {path!r} is no folder or hub id of an autoencoder: {reason}")


def check_vae(path: str, own: Mapping[str, Any], model: str) -> None:
    other, _ = config_of_vae(path)
    if str(other.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"vae {path!r} is a {other['_class_name']}; {model!r} has an AutoencoderKL")
    if len(other["block_out_channels"]) != len(own["block_out_channels"]):
        raise ValueError(f"vae {path!r} scales pictures down by another factor than the one of {model!r}")
    for key, default in LATENT_SPACE.items():
        ours, theirs = own.get(key, default), other.get(key, default)
        if ours != theirs:
            raise ValueError(
                f"vae {path!r} has another latent space than {model!r}: its {key} is {theirs}, the model's is {ours}"
            )


def check_colours(path: str, channels: int, takes: Sequence[int] = (3,)) -> None:
    """Refuse an autoencoder of more than pictures.

    Raises:
        ValueError: It takes more, or other, channels.
    """
    if channels not in takes:
        raise ValueError(
            f"model {path!r}: its autoencoder takes {channels} channels, and a picture has 3: depth, layers and masks "
            "cannot be inverted here"
        )


def chosen_vae(settings: LatentModelSettings, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the autoencoder that will be used."""
    return own if settings.vae is None else config_of_vae(settings.vae)[0]


def configuration(settings: LatentModelSettings) -> tuple[str, str | None]:
    """Folder or hub id of the model's configuration, and the revision there.

    Raises:
        ValueError: The model is one file, and no checkpoint of Stable Diffusion.
    """
    if not is_one_file(settings.model):
        return settings.model, settings.revision
    found = configuration_of(settings.model)
    check_parts(settings.model, own_vae=settings.vae is None)
    return settings.config or found, None


def networks(settings: LatentModelSettings, encoders: Sequence[str], upcast: bool) -> dict[str, Network]:
    """The model's networks by part, the denoiser first.

    An autoencoder that has to run in float32 beside half-precision networks is read from its full-precision file if
    there is one, whatever variant the other parts come in: rounded weights would bound every picture's PSNR.
    """
    pickles = bool(settings.allow_pickle)
    names = ("unet", "vae", *encoders)
    parts: dict[str, Network]
    if is_one_file(settings.model):
        parts = {part: FilePart(settings.model, configuration(settings)[0], part) for part in names}
    else:
        place = partial(Place, settings.model, settings.revision, allow_pickle=pickles)
        variants = {part: None if part == "vae" and upcast else settings.variant for part in names}
        parts = {part: place(folder=part, variant=variant) for part, variant in variants.items()}
    if settings.vae is not None:
        parts["vae"] = Place(settings.vae, None, config_of_vae(settings.vae)[1], allow_pickle=pickles)
    return parts


def load_pipeline(
    settings: LatentModelSettings, kind: Any, parts: Mapping[str, Network], upcast: bool, left_out: Mapping[str, Any]
) -> Any:
    """The pipeline, each network in the type that it runs in, on the CPU.

    Args:
        kind: Its class.
        parts: From `networks`.
        upcast: The autoencoder is read in float32.
        left_out: Its parts that are not loaded.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {
        "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }  # fmt: skip
    dtype: torch.dtype = getattr(torch, settings.dtype)
    one_file = is_one_file(settings.model)
    # Text encoders are no classes of diffusers: out of a file, they come with the pipeline.
    loaded = {
        part: network.load(
            classes[part],
            torch.float32 if part == "vae" and upcast else dtype,
            **quantized.loading(settings.quantization_config, part, by_transformers=part.startswith("text")),
        )
        for part, network in parts.items()
        if not one_file or part in ("unet", "vae")
    }
    if one_file:
        config = configuration(settings)[0]
        return kind.from_single_file(here(settings.model), config=here(config), dtype=dtype, **loaded, **left_out)
    return kind.from_pretrained(here(settings.model), revision=settings.revision, dtype=dtype, **loaded, **left_out)


def lines(
    settings: LatentModelSettings,
    kind: str,
    denoiser: str = "unet",
    without: Sequence[str] = (),
    loader: str | None = None,
    encoders: Sequence[str] = (),
) -> tuple[list[str], str]:
    """What is imported from diffusers, and the lines of Python that make `pipe` of the model.

    Args:
        kind: Class of its pipeline, for a checkpoint of one file.
        denoiser: The part whose weight files tell of variants.
        without: Parts that the pipeline has to be told are not there.
        encoders: Parts that are networks of transformers.
        loader: Class that reads a folder; None: the one that its index names.
    """
    names, code, given = [], [], ""
    if settings.vae is not None:
        names.append("AutoencoderKL")
        folder = config_of_vae(settings.vae)[1]
        where = f', subfolder="{folder}"' if folder else ""
        fetched, vae = brought(settings.vae, "vae")
        code += [*fetched, f'vae = AutoencoderKL.from_pretrained("{vae}"{where}, dtype=torch.float32)']
        given = ", vae=vae"
    fetched, model = brought(settings.model, "model")
    code += fetched
    if is_one_file(settings.model):
        names.append(kind)
        fetched, config = brought(configuration(settings)[0], "config")
        code += [*fetched, f'pipe = {kind}.from_single_file("{model}", config="{config}"{given}, dtype=torch.float32)']
    else:
        names.append(loader or "DiffusionPipeline")
        if settings.revision is not None:
            given += f', revision="{settings.revision}"'
        before, quantised = quantized.lines(settings.quantization_config, encoders)
        code += before
        given += quantised + _variant(settings, denoiser) + "".join(f", {part}=None" for part in without)
        code.append(f'pipe = {names[-1]}.from_pretrained("{model}"{given}, dtype=torch.float32)')
    code += [lora.usage(f"lora_{number}") for number, lora in enumerate(settings.loras or ())]
    return names, "\n".join(code)


def _variant(settings: LatentModelSettings, denoiser: str) -> str:
    """The pipeline's argument that says which weight files it reads, where it does not find them by itself."""
    try:
        pickles = bool(settings.allow_pickle)
        weights = weights_of(
            settings.model, settings.revision, denoiser, variant=settings.variant, allow_pickle=pickles
        )  # fmt: skip
    except (FileNotFoundError, WeightsError):  # whoever loads it is told
        return ""
    return "" if weights.variant is None else f', variant="{weights.variant}"'
