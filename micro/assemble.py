"""Puts trained parts into folders of diffusers and transformers, in half precision, and reads them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)  # fmt: skip
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5Tokenizer,
)  # fmt: skip

from micro import MODELS, clip, flows, unets

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PIPELINES = {
    "prior": KandinskyV22PriorPipeline, "decoder": KandinskyV22Pipeline, "stable-diffusion": StableDiffusionPipeline,
    "flux": FluxPipeline, "flux-schnell": FluxPipeline, "sd3": StableDiffusion3Pipeline,
}  # fmt: skip


def prior(
    image_encoder: CLIPVisionModelWithProjection, text_encoder: CLIPTextModelWithProjection, words: CLIPTokenizer,
    transformer: PriorTransformer,
) -> KandinskyV22PriorPipeline:  # fmt: skip
    return KandinskyV22PriorPipeline(
        prior=transformer, image_encoder=image_encoder, text_encoder=text_encoder, tokenizer=words,
        scheduler=unets.prior_scheduler(), image_processor=clip.image_processor(),
    )  # fmt: skip


def decoder(unet: UNet2DConditionModel, movq: VQModel) -> KandinskyV22Pipeline:
    return KandinskyV22Pipeline(unet=unet, scheduler=unets.sd_scheduler(), movq=movq)


def stable_diffusion(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, words: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    scheduler: DDIMScheduler = unets.sd_scheduler()
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def flux(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, words: CLIPTokenizer, t5: T5EncoderModel, t5_words: T5Tokenizer,
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:  # fmt: skip
    """FLUX.1-dev's pipeline, or FLUX.1-schnell's where the transformer knows no guidance."""
    guided = transformer.config.guidance_embeds
    return FluxPipeline(
        scheduler=flows.flux_scheduler() if guided else flows.schnell_scheduler(), vae=vae, text_encoder=text_encoder,
        tokenizer=words, text_encoder_2=t5, tokenizer_2=t5_words, transformer=transformer,
    )  # fmt: skip


def sd3(
    vae: AutoencoderKL, first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection, words: CLIPTokenizer,
    t5: T5EncoderModel, t5_words: T5Tokenizer, transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:  # fmt: skip
    return StableDiffusion3Pipeline(
        scheduler=flows.sd3_scheduler(), vae=vae, text_encoder=first, tokenizer=words, text_encoder_2=second,
        tokenizer_2=words, text_encoder_3=t5, tokenizer_3=t5_words, transformer=transformer,
    )  # fmt: skip


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline's folder in float16 safetensors; the pipeline in memory stays in float32."""
    import torch

    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline.to(torch.float32)
    for path in folder.glob("*/config.json"):
        _forget_origin(path)


def save_part(part: Any, folder: Path) -> None:
    """Write one network of a pipeline's folder, as `save` does."""
    import torch

    part.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "config.json")


def _forget_origin(path: Path) -> None:
    """A part says which folder of this machine it was read from."""
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def load(name: str, folder: Path | None = None, device: str = "cpu") -> Any:
    """Load one of the shipped pipelines (``prior``, ``decoder``, ``stable-diffusion``) in float32.

    Raises:
        OSError: the folder is missing, truncated, or holds another kind of model; says which, and what was expected.
    """
    import json

    import torch

    kind = _PIPELINES[name]
    folder = Path(folder or MODELS / name)
    expected = f"{folder}: no {kind.__name__} can be loaded from this folder"
    index = folder / "model_index.json"
    if not index.is_file():
        raise OSError(f"{expected}: there is no model_index.json; expected a folder written by `python -m micro.train`")
    try:
        found = json.loads(index.read_text()).get("_class_name")
    except ValueError:
        raise OSError(f"{expected}: model_index.json is not valid JSON; the file is truncated or was changed") from None
    if found != kind.__name__:
        raise OSError(f"{expected}: it holds a {found}")
    try:
        pipeline = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{expected}: a part of it is missing or truncated ({reason})") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
