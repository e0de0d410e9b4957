"""Stable Diffusion 1.x, 2.x and XL as plain functions of tensors: the family of latent models with a U-Net.

A model is a folder in diffusers' layout or a hub id. With its scheduler run by DDIM (or, with `sampler: model`, as it
is), what comes out behaves exactly as the diffusers pipeline of that folder, so that latents found here regenerate
their picture there.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents as the U-Net sees them (scaled); `m_BCHW` the U-Net's
output; L text tokens, E their width.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self

import torch

from stages.engine.device import chosen_device
from stages.engine.room import Rooms
from stages.models import autoencoder, quantized
from stages.models.captions import Reader
from stages.models.copies import here
from stages.models.files import CONFIG, INDEX, SCHEDULER, read_config
from stages.models.guidance import classifier_free, guided
from stages.models.latent import Combine, Condition, Geometry, Predict, Sizes
from stages.models.learned_words import LearnedWord, add_word, check_learned_with, learned_words
from stages.models.loras import add_lora
from stages.models.memory import fitting, on_meta, peak_bytes, relieve
from stages.models.multistep import Multistep
from stages.models.one_file import is_one_file
from stages.models.origin import check_colours, check_vae, chosen_vae, configuration, lines, load_pipeline, networks
from stages.models.recompute import recompute
from stages.models.schedule import Schedule, changed_config
from stages.models.settings import FLOW_SCHEDULERS, LatentModelSettings, SamplingSettings
from stages.models.usage import Usage
from stages.models.words import Encoder


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder. A `stages.models.latent.LatentModel`.

    The VAE runs in float32 where it overflows in float16 (`force_upcast`, as SDXL's), and where pictures are measured.

    Args:
        pipeline: Its pipeline of diffusers, loaded on the device.
        geometry: From its configuration.
    """

    index = "StableDiffusion"
    """How the class of its pipelines begins."""
    encoders: tuple[str, ...] = ("text_encoder",)
    left_out: Mapping[str, Any] = {
        "safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False,
    }  # fmt: skip
    """Not loaded, and need not be there: what judges pictures, or takes them as prompts."""
    mended: Mapping[str, Any] = {"steps_offset": 1, "clip_sample": False}
    """What its pipeline makes of these parameters of a scheduler, whatever the folder says."""

    def __init__(self, pipeline: Any, geometry: Geometry) -> None:
        self.pipeline, self.geometry = pipeline, geometry
        for part in geometry.parts:
            getattr(pipeline, part).eval().requires_grad_(False)
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.device: torch.device = self.unet.device
        self.dtypes = {part: getattr(pipeline, part).dtype for part in geometry.parts}
        self.rooms = Rooms(self.device, partial(fitting, self), partial(relieve, self))
        self._told: dict[float, torch.Tensor] = {}

    # --- from a folder

    @classmethod
    def read_geometry(cls, settings: LatentModelSettings) -> Geometry:
        """Read the configuration; loads no weights.

        Raises:
            ValueError: Not such a model, or one that cannot be inverted, or a size that its autoencoder cannot divide.
        """
        path = settings.model
        unet, vae, scheduler, texts = _configurations(*configuration(settings), cls.encoders)
        _check_relatives(path, unet, vae)
        quantized.check_quantization(
            settings.quantization_config, path, ("unet", *cls.encoders), cls.encoders, settings.device,
            one_file=is_one_file(path),
        )  # fmt: skip
        if settings.vae is not None:
            check_vae(settings.vae, vae, path)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        own = int(unet["sample_size"]) * factor
        size = settings.size or own
        down = 2 ** (len(unet["block_out_channels"]) - 1)
        sizes = Sizes(path, factor, math.lcm(factor * down, 8), own)  # the pipeline takes multiples of 8 alone
        sizes.check(size, size)
        stock = isinstance(settings, SamplingSettings) and settings.sampler == "model"
        if settings.max_sequence_length is not None:
            raise ValueError(f"max_sequence_length: CLIP reads for model {path!r}, and always 77 tokens; leave it out")
        if isinstance(settings, SamplingSettings) and settings.offload is not None:
            raise ValueError(f"offload: the text encoders of model {path!r} are small and stay; leave it out")
        if isinstance(settings, SamplingSettings) and not stock:
            _check_heeded(settings.scheduler)
        effective = changed_config(_as_loaded(scheduler, cls.mended, settings, stock), settings.scheduler)
        if effective.get("_class_name") in FLOW_SCHEDULERS:
            raise ValueError(f"model {path!r} has a U-Net, which a {effective['_class_name']} does not run")
        overflows = settings.dtype == "float16" and bool(chosen_vae(settings, vae).get("force_upcast", True))
        upcast = overflows or (settings.measures_pictures and settings.dtype != "float32")
        text_shape = (int(texts[0].max_position_embeddings), int(unet["cross_attention_dim"]))
        widths = tuple(int(text.hidden_size) for text in texts)
        words = learned_words(settings.words or (), path, widths)
        geometry = Geometry(
            width=size,
            height=size,
            sizes=sizes,
            latent_shape=(int(vae["latent_channels"]), size // factor, size // factor),
            scaling_factor=float(vae.get("scaling_factor", 0.18215)),
            scheduler=effective,
            text_shape=text_shape,
            word_widths=widths,
            upcast=upcast,
            parts=networks(settings, cls.encoders, upcast),
            loras=tuple(settings.loras or ()),
            words=words,
            usage=_usage(settings, f"{cls.index}Pipeline", effective, stock, cls.text_latent(text_shape), words),
            sampler="model" if stock else "ddim",
            guiding="classifier-free" if unet.get("time_cond_proj_dim") is None else "told",
        )
        if settings.words:
            prints = replace(geometry, words=()).fingerprints()
            encoders = {
                part: print_["fingerprint"] for part, print_ in prints.items() if part.startswith("text_encoder")
            }
            check_learned_with(settings.words, path, widths, encoders)
        return geometry

    @classmethod
    def load(cls, settings: LatentModelSettings, geometry: Geometry) -> StableDiffusion:
        """Read the weights, each part in the type that it runs in, onto the device."""
        import diffusers

        kind: Any = getattr(diffusers, f"{cls.index}Pipeline")
        pipeline = load_pipeline(settings, kind, geometry.parts, geometry.upcast, cls.left_out)
        for lora in geometry.loras:
            add_lora(pipeline, lora)
        for word in geometry.words:
            add_word(pipeline, word)
        if settings.scheduler is not None:
            sampler: Any = getattr(diffusers, geometry.scheduler["_class_name"])
            pipeline.scheduler = sampler.from_config(dict(geometry.scheduler))
        pipeline.set_progress_bar_config(disable=True)
        for part in geometry.parts:
            quantized.place(getattr(pipeline, part), chosen_device(settings.device))
        return cls(pipeline, geometry)

    @classmethod
    def without_weights(cls, settings: LatentModelSettings, geometry: Geometry) -> Self:
        """Denoiser and autoencoder on the meta device, for `activation_bytes` alone."""
        from diffusers import AutoencoderKL, UNet2DConditionModel

        unet, vae, *_ = _configurations(*configuration(settings), cls.encoders)
        dtype = getattr(torch, settings.dtype)
        pipeline = SimpleNamespace(
            unet=on_meta(UNet2DConditionModel, unet, dtype),
            vae=on_meta(AutoencoderKL, chosen_vae(settings, vae), torch.float32 if geometry.upcast else dtype),
        )
        return cls(pipeline, replace(geometry, parts={part: geometry.parts[part] for part in ("unet", "vae")}))

    @staticmethod
    def text_latent(shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Usage`."""
        return {"prompt_embeds": ("text_latent", (1, *shape))}

    # --- pictures

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.rooms["encode"](partial(autoencoder.encode, self.vae), x_BCHW)

    def posterior(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return autoencoder.posterior(self.vae, x_BCHW)

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        return self.rooms["decode"](partial(autoencoder.decode, self.vae), z_BCHW)

    def at(self, width: int, height: int) -> Self:
        model = copy.copy(self)
        model.geometry = self.geometry.at(width, height)
        return model

    # --- prompts

    @property
    def text_encoders(self) -> tuple[Encoder, ...]:
        return (Encoder(self.pipeline.tokenizer, self.pipeline.text_encoder),)

    @property
    def readers(self) -> tuple[Reader, ...]:
        tokenizers = [encoder.tokenizer for encoder in self.text_encoders]
        return tuple(Reader(tokenizer, tokenizer.model_max_length) for tokenizer in tokenizers)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], *, guided: bool = False, negative: str | None = None) -> Condition:
        text_BLE, null_BLE, *_ = self._encode_prompts(prompts, guided, negative)
        return {"text_BLE": text_BLE, **({"null_text_BLE": null_BLE} if guided else {})}

    def _encode_prompts(self, prompts: Sequence[str], guided: bool, negative: str | None) -> Any:
        return self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided,
            negative_prompt=None if negative is None else [negative] * len(prompts),
        )  # fmt: skip

    def text_condition(self, text_BLE: torch.Tensor, pooled_BE: torch.Tensor | None = None) -> Condition:
        return {"text_BLE": text_BLE}

    # --- the U-Net

    def _added(self, condition: Condition) -> dict[str, torch.Tensor] | None:
        """What the U-Net is told beside the text."""
        return None

    def _told_guidance(self, rows: int, guidance: float) -> torch.Tensor | None:
        """(B, E) of a U-Net whose guidance is an input (latent consistency models, Luo et al., 2023, equation 14)."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        if guidance not in self._told:
            told_1E = self.pipeline.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), embedding_dim=width)
            self._told[guidance] = told_1E.to(self.device, self.dtypes["unet"])
        return self._told[guidance].expand(rows, -1)

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, guidance: float = 1.0
    ) -> torch.Tensor:
        """One U-Net call without classifier-free guidance; output in float32."""
        dtype = self.dtypes["unet"]
        m_BCHW: torch.Tensor = self.unet(
            z_BCHW.to(dtype),
            t_B,
            timestep_cond=self._told_guidance(len(z_BCHW), guidance),
            encoder_hidden_states=condition["text_BLE"].to(dtype),
            added_cond_kwargs=self._added(condition),
            return_dict=False,
        )[0]
        return m_BCHW.float()

    def predictor(self, guidance: float = 1.0) -> Predict:
        """The U-Net's output under classifier-free guidance, one call on 2B rows when guidance is above 1; where
        guidance is an input of the network, under that."""
        if self.geometry.guiding == "told":
            return partial(self.rooms["predict"], partial(self.forward, guidance=guidance))
        forward = partial(self.rooms["predict"], self.forward)
        return forward if guidance <= 1 else guided(forward, self.combination(guidance))

    def combination(self, guidance: float) -> Combine:
        return classifier_free(guidance)

    def schedule(self, steps: int) -> Schedule | Multistep:
        return self.geometry.schedule(steps).to(self.device)

    @torch.no_grad()
    def draw(
        self, condition: Condition, *, steps: int, guidance: float, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        names = {"text_BLE": "prompt_embeds", "pooled_BE": "pooled_prompt_embeds"}
        names |= {f"null_{key}": f"negative_{name}" for key, name in names.items()}
        given = {names[key]: value for key, value in condition.items() if key in names}

        def drawn(part: slice) -> torch.Tensor:
            latents: torch.Tensor = self.pipeline(
                **{name: value[part] for name, value in given.items()}, num_inference_steps=steps,
                guidance_scale=guidance, height=self.geometry.height, width=self.geometry.width,
                generator=[one.clone_state() for one in generators[part]], output_type="latent",
            ).images  # fmt: skip
            return latents

        return torch.cat(list(self.rooms["draw"].parts(len(generators), drawn)))

    # --- memory

    def blank_condition(self) -> Condition:
        """One row's condition on the meta device."""
        return {"text_BLE": torch.empty(1, *self.geometry.text_shape, dtype=self.dtypes["unet"], device="meta")}

    def activation_bytes(self, call: Literal["predict", "encode", "decode"], *, gradient: bool = False) -> int:
        """See `stages.models.latent.LatentModel`. Counted on the meta device by `stages.models.memory.peak_bytes`."""
        C, H, W = self.geometry.latent_shape
        if call == "predict":
            z = torch.empty(1, C, H, W, dtype=self.dtypes["unet"], device="meta")
            t = torch.ones(1, dtype=torch.int64, device="meta")
            told = self.blank_condition()
            text, added = told["text_BLE"], self._added(told)
            return peak_bytes(
                self.unet, lambda net: net(z, t, text, added_cond_kwargs=added).sample, z, gradient=gradient
            )
        shape = (1, 3, self.geometry.height, self.geometry.width) if call == "encode" else (1, C, H, W)
        x = torch.empty(shape, dtype=self.dtypes["vae"], device="meta")
        if call == "encode":
            return peak_bytes(self.vae, lambda net: net.encode(x).latent_dist.mean, x, gradient=gradient)
        return peak_bytes(self.vae, lambda net: net.decode(x).sample, x, gradient=gradient)

    def lies(self, call: Literal["predict", "encode", "decode"]) -> Mapping[torch.device, float]:
        return {self.device: 1.0}

    def recompute(self, call: Literal["predict", "decode"]) -> bool:
        return recompute(self.unet if call == "predict" else self.vae)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders side by side, and a U-Net that is also told the second one's pooled output and the
    picture's size (`pooled_BE`, `time_ids_B6`; Podell et al., 2023, section 2.2)."""

    index = "StableDiffusionXL"
    encoders = ("text_encoder", "text_encoder_2")
    left_out = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    mended: Mapping[str, Any] = {}

    @staticmethod
    def text_latent(shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**StableDiffusion.text_latent(shape), "pooled_prompt_embeds": ("pooled", (1, -1))}

    @property
    def text_encoders(self) -> tuple[Encoder, ...]:
        pipeline = self.pipeline
        return (
            Encoder(pipeline.tokenizer, pipeline.text_encoder, penultimate=True),
            Encoder(pipeline.tokenizer_2, pipeline.text_encoder_2, penultimate=True),
        )

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], *, guided: bool = False, negative: str | None = None) -> Condition:
        text_BLE, null_BLE, pooled_BE, null_pooled_BE = self._encode_prompts(prompts, guided, negative)
        nulls = {"null_text_BLE": null_BLE, "null_pooled_BE": null_pooled_BE} if guided else {}
        return {**self.text_condition(text_BLE, pooled_BE), **nulls}

    def text_condition(self, text_BLE: torch.Tensor, pooled_BE: torch.Tensor | None = None) -> Condition:
        if pooled_BE is None:
            raise ValueError("this U-Net needs a pooled text embedding, and the text encoder has none")
        size = (self.geometry.height, self.geometry.width)
        # height and width of the original, left and top of the crop, height and width that are asked for
        sizes = torch.tensor([*size, 0, 0, *size], dtype=self.dtypes["unet"], device=text_BLE.device)
        return {"text_BLE": text_BLE, "pooled_BE": pooled_BE, "time_ids_B6": sizes.repeat(len(text_BLE), 1)}

    def blank_condition(self) -> Condition:
        config, like = self.unet.config, {"dtype": self.dtypes["unet"], "device": "meta"}
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        told = {"pooled_BE": torch.empty(1, pooled, **like), "time_ids_B6": torch.empty(1, 6, **like)}
        return {**super().blank_condition(), **told}

    def _added(self, condition: Condition) -> dict[str, torch.Tensor]:
        return {"text_embeds": condition["pooled_BE"], "time_ids": condition["time_ids_B6"]}


def _check_relatives(path: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse what is of another make or takes more than a text, though its pipeline is called Stable Diffusion too.

    Raises:
        ValueError: It is such a one.
    """
    for part, config, wanted in (("unet", unet, "UNet2DConditionModel"), ("vae", vae, "AutoencoderKL")):
        found = str(config.get("_class_name", wanted))
        if found != wanted:
            raise ValueError(f"model {path!r}: its {part} is a {found}, not a {wanted}")
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"model {path!r} takes {unet['in_channels']} channels, its autoencoder gives {vae['latent_channels']}: one "
            "that takes a picture beside the text (for inpainting, editing, depth, upscaling) cannot be inverted here"
        )
    check_colours(path, int(vae.get("in_channels", 3)))
    if unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
        raise ValueError(f"model {path!r}: its U-Net is told a class or a noise level beside the text: not supported")


OFF_IN_DDIM = ("clip_sample", "thresholding")
"""Parameters that DDIM has and that inversion switches off."""


def _as_loaded(
    scheduler: dict[str, Any], mended: Mapping[str, Any], settings: LatentModelSettings, stock: bool
) -> dict[str, Any]:
    """The scheduler's configuration as the model's pipeline has it once loaded.

    The pipeline mends a parameter also where the folder leaves it out, but a scheduler that is then made of its
    configuration has it only where the folder says it: diffusers drops what was a default.
    """
    import diffusers

    name = scheduler.get("_class_name")
    if not stock:
        mended = {key: value for key, value in mended.items() if key == "steps_offset"}
    elif settings.scheduler is None:
        index = read_config(settings.model, INDEX, revision=settings.revision)
        loaded = index.get("scheduler", [None, None])[1]
        if loaded != name:
            raise ValueError(
                f"sampler: model: {settings.model!r} loads a {loaded}, but its scheduler's configuration is of a "
                f"{name}; say which with scheduler: {{class: ...}}"
            )
        known = inspect.signature(getattr(diffusers, str(name), dict)).parameters
        return {**scheduler, **{key: value for key, value in mended.items() if key in known}}
    return {**scheduler, **{key: value for key, value in mended.items() if key in scheduler}}


def _check_heeded(changes: Mapping[str, Any] | None) -> None:
    """Refuse changes that DDIM does not heed.

    Raises:
        ValueError: There is one.
    """
    from diffusers import DDIMScheduler

    known = inspect.signature(DDIMScheduler).parameters
    for key, value in (changes or {}).items():
        if key != "class" and (key not in known or (key in OFF_IN_DDIM and value)):
            raise ValueError(
                f"scheduler: {key} has no effect on DDIM, which this job inverts and runs over the scheduler's noise "
                "levels; leave it out, or set sampler: model for the scheduler's own steps"
            )


def _configurations(
    path: str, revision: str | None, encoders: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[Any]]:
    """Of U-Net, autoencoder, scheduler and text encoders.

    Raises:
        ValueError: A part is missing.
    """
    from transformers import CLIPTextConfig

    part = ""
    try:
        found = []
        for part, name in (("unet", CONFIG), ("vae", CONFIG), ("scheduler", SCHEDULER)):
            found.append(read_config(path, name, folder=part, revision=revision))
        local = Path(here(path)).expanduser()
        for part in (*encoders, *(encoder.replace("text_encoder", "tokenizer") for encoder in encoders)):
            if local.is_dir() and not (local / part).is_dir():
                raise FileNotFoundError(f"there is no folder {local / part}")
        texts = []
        for part in encoders:
            texts.append(CLIPTextConfig.from_pretrained(here(path), subfolder=part, revision=revision or "main"))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {path!r} lacks its {part}, or it cannot be read: {reason}") from error
    return found[0], found[1], found[2], texts


def _swap(settings: LatentModelSettings, scheduler: Mapping[str, Any], stock: bool) -> tuple[str, dict[str, Any]]:
    """The class of sampler that regenerates, and what is changed in the pipeline's configuration for it."""
    from diffusers import DDIMScheduler

    given = {key: value for key, value in (settings.scheduler or {}).items() if key != "class"}
    if stock:
        return str(scheduler["_class_name"]), given
    known = set(inspect.signature(DDIMScheduler).parameters) - set(OFF_IN_DDIM)
    changes = {key: value for key, value in given.items() if key in known} | {"clip_sample": False}
    return "DDIMScheduler", changes | ({"thresholding": False} if scheduler.get("thresholding") else {})


def _usage(
    settings: LatentModelSettings, kind: str, scheduler: Mapping[str, Any], stock: bool,
    text_latent: Mapping[str, tuple[str, tuple[int, ...]]], words: Sequence[LearnedWord],
) -> Usage:  # fmt: skip
    sampler, changes = _swap(settings, scheduler, stock)
    where, revision = configuration(settings)
    index = read_config(where, INDEX, revision=revision)
    names, pipeline = lines(
        settings, kind, loader=None if index.get("_class_name") == kind else kind,
        encoders=("text_encoder", "text_encoder_2"),
    )  # fmt: skip
    pipeline = "\n".join([pipeline, *(word.usage(f"word_{number}") for number, word in enumerate(words))])
    if not changes:
        return Usage(tuple(names), pipeline, (), "", text_latent)
    options = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    swap = f"pipe.scheduler = {sampler}.from_config(pipe.scheduler.config, {options})"
    return Usage(tuple(names), pipeline, (sampler,), swap, text_latent)
