"""One protocol for the decoders of image embeddings, and which one a pipeline's folder asks for.

All drawing is done by diffusers' own pipelines; a row's noise is its own.

Legend: B rows, E embedding width, T states of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch

from stages.decode.settings import Decoding, EmbeddingDecoding, IPAdapter
from stages.engine.device import unasked_dtype
from stages.engine.randomness import row_generator
from stages.models import clip, kandinsky
from stages.models.copies import here
from stages.models.files import INDEX, SCHEDULER, read_config, sha256
from stages.models.kandinsky import DecoderError
from stages.models.latent import Place

Identities = dict[str, dict[str, str]]


class Decoder(Protocol):
    """Draws."""

    def pictures(self, z_BE: torch.Tensor, keys: list[str]) -> list[Any]:
        """A PIL picture for each embedding (or sequence z_BTE); all that is random about row b is drawn from
        (seed, keys[b])."""


@dataclass(frozen=True)
class Kind:
    """A kind of decoder.

    Attributes:
        width: E, from configurations alone; refuses settings that do not fit.
        identity: Its networks, for `StageInfo.models`.
        load: The decoder, on a device.
        length: T, where a row brings a sequence; None: one embedding.
    """

    width: Callable[[EmbeddingDecoding], int]
    identity: Callable[[EmbeddingDecoding], Identities]
    load: Callable[[EmbeddingDecoding, int, str], Decoder]
    length: Callable[[EmbeddingDecoding], int | None] = lambda settings: None


def kind_of(decode: Decoding) -> Kind:
    """What draws, by the class that the pipeline's ``model_index.json`` names.

    Raises:
        DecoderError: There is no pipeline, it takes no embeddings, or the settings are those of another kind.
    """
    try:
        config = read_config(decode.model, INDEX, revision=decode.revision)
    except OSError as error:
        raise DecoderError(f"{decode.model}: no pipeline can be loaded: {error}") from None
    name = str(config.get("_class_name"))
    if name not in KINDS:
        raise DecoderError(f"{decode.model}: a {name} draws nothing from image embeddings; one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if decode.noise_level is not None and kind is not UNCLIP:
        raise DecoderError(f"{decode.model}: `noise_level` belongs to Stable unCLIP, this is a {name}")
    if decode.prior is not None and kind is not CASCADE:
        raise DecoderError(f"{decode.model}: `prior` belongs to Stable Cascade, this is a {name}")
    if decode.prior is None and kind is CASCADE:
        raise DecoderError(
            f"{decode.model}: Stable Cascade takes image embeddings in its prior; set `prior` to that pipeline "
            "(stabilityai/stable-cascade-prior)"
        )
    if decode.ip_adapter is not None and kind not in (IP_SD, IP_XL):
        raise DecoderError(f"{decode.model}: `ip_adapter` belongs to Stable Diffusion, this is a {name}")
    if decode.ip_adapter is None and kind in (IP_SD, IP_XL):
        raise DecoderError(f"{decode.model}: a {name} takes image embeddings through an adapter; set `ip_adapter`")
    return kind


# --- Kandinsky 2.2 ---------------------------------------------------------------------------------------------------


def _kandinsky_width(settings: EmbeddingDecoding) -> int:
    decode = settings.decode
    config = read_config(decode.model, folder="unet", revision=decode.revision)
    width = int(config["encoder_hid_dim"])
    if settings.encoder is not None:
        kandinsky.check_width(decode, clip.embedding_width(settings.encoder, settings.revision))
    elif decode.guidance > 1:
        raise DecoderError(
            f"{decode.model}: Kandinsky's guidance contrasts with the embedding of an all-zero picture; set `encoder` "
            "to the image encoder of the embeddings (its prior pipeline has it), or `guidance: 1`"
        )
    return width


def _kandinsky_identity(settings: EmbeddingDecoding) -> Identities:
    found = kandinsky.identity(settings.decode, settings.allow_pickle)
    if settings.encoder is not None:
        pickles = settings.allow_pickle
        found["image_encoder"] = clip.identity(settings.encoder, "image", settings.revision, allow_pickle=pickles)
    return found


def _kandinsky(settings: EmbeddingDecoding, seed: int, device: str) -> Decoder:
    if settings.encoder is None:  # without guidance the pipeline asks for it and leaves it out
        negative_E = torch.zeros(_kandinsky_width(settings))
    else:
        pickles = settings.allow_pickle
        encoder = clip.ImageEncoder(settings.encoder, settings.revision, device, allow_pickle=pickles)
        negative_E = encoder.zero_embedding()
    return kandinsky.Decoder(
        settings.decode, negative_E, seed=seed, device=device, allow_pickle=settings.allow_pickle
    )  # fmt: skip


# --- stock pipelines -------------------------------------------------------------------------------------------------

UNCLIP_PARTS = ("unet", "vae", "text_encoder", "image_encoder", "image_normalizer")
SD_PARTS = ("unet", "vae", "text_encoder")
XL_PARTS = (*SD_PARTS, "text_encoder_2")


def _places(settings: EmbeddingDecoding, parts: Iterable[str]) -> dict[str, Place]:
    decode = settings.decode
    return {
        part: Place(decode.model, decode.revision, part, allow_pickle=bool(settings.allow_pickle)) for part in parts
    }


def _identity(settings: EmbeddingDecoding, parts: Iterable[str]) -> Identities:
    return {f"decoder_{part}": place.identity() for part, place in _places(settings, parts).items()}


class StockDecoder:
    """A pipeline of diffusers that is told an empty prompt, and an embedding.

    Args:
        kind: The pipeline's class.
        parts: Its networks.
        left_out: Other parts of it, that are not loaded.

    Raises:
        DecoderError: There is no such pipeline.
    """

    def __init__(self, settings: EmbeddingDecoding, kind: Any, parts: tuple[str, ...], seed: int, device: str,
                 **left_out: Any) -> None:  # fmt: skip
        self.decode, self.seed, self.device = settings.decode, seed, device
        self.dtype = unasked_dtype(device)
        try:
            places = _places(settings, parts)
            networks = {part: places[part].load(_class(part), self.dtype) for part in parts}
            pipe = kind.from_pretrained(
                here(self.decode.model), dtype=self.dtype, revision=self.decode.revision, **networks, **left_out
            )
        except (OSError, ValueError) as error:
            raise DecoderError(f"{self.decode.model}: the decoder cannot be loaded: {error}") from None
        self.pipe: Any = pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        for part in parts:
            getattr(pipe, part).requires_grad_(False)

    def pictures(self, z_BE: torch.Tensor, keys: list[str]) -> list[Any]:
        decode = self.decode
        done: list[Any] = self.pipe(
            prompt=[""] * len(z_BE), num_inference_steps=decode.steps, guidance_scale=decode.guidance,
            height=decode.size, width=decode.size,
            generator=[row_generator(self.seed, key, "decode") for key in keys],
            **self.conditions(z_BE.to(self.device, self.dtype)),
        ).images  # fmt: skip
        return done

    def conditions(self, z_BE: torch.Tensor) -> dict[str, Any]:
        """How the pipeline is told the embeddings."""
        raise NotImplementedError


def _class(part: str) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    return {
        "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection, "image_encoder": CLIPVisionModelWithProjection,
        "image_normalizer": StableUnCLIPImageNormalizer,
    }[part]  # fmt: skip


# --- Stable unCLIP ---------------------------------------------------------------------------------------------------


def _unclip_width(settings: EmbeddingDecoding) -> int:
    decode = settings.decode
    normalizer = read_config(decode.model, folder="image_normalizer", revision=decode.revision)
    noising = read_config(decode.model, SCHEDULER, folder="image_noising_scheduler", revision=decode.revision)
    levels = int(noising.get("num_train_timesteps", 1000))
    if (decode.noise_level or 0) >= levels:
        raise DecoderError(f"{decode.model}: noise_level is {decode.noise_level}, give 0 to {levels - 1}")
    return int(normalizer["embedding_dim"])


class UnCLIPDecoder(StockDecoder):
    """Stable unCLIP 2.1 (L and H). The embedding is normalised, noised by `noise_level`, and carries that level along;
    its noise is drawn before the latent's, from the same generator.
    """

    def __init__(self, settings: EmbeddingDecoding, seed: int, device: str) -> None:
        from diffusers import StableUnCLIPImg2ImgPipeline

        super().__init__(settings, StableUnCLIPImg2ImgPipeline, UNCLIP_PARTS, seed, device)

    def conditions(self, z_BE: torch.Tensor) -> dict[str, Any]:
        return {"image_embeds": z_BE, "noise_level": self.decode.noise_level or 0}


# --- Stable Cascade --------------------------------------------------------------------------------------------------

CASCADE_PRIOR = ("prior", "text_encoder")
CASCADE_DECODER = ("decoder", "text_encoder", "vqgan")


def _cascade_width(settings: EmbeddingDecoding) -> int:
    prior = str(settings.decode.prior)
    try:
        config = read_config(prior, folder="prior")
    except OSError as error:
        raise DecoderError(f"prior {prior}: no prior of Stable Cascade can be loaded: {error}") from None
    if not config.get("clip_image_in_channels"):
        raise DecoderError(f"prior {prior}: takes no image embeddings")
    return int(config["clip_image_in_channels"])


def _cascade_priors(settings: EmbeddingDecoding) -> dict[str, Place]:
    pickles = bool(settings.allow_pickle)
    return {part: Place(str(settings.decode.prior), None, part, allow_pickle=pickles) for part in CASCADE_PRIOR}


def _cascade_identity(settings: EmbeddingDecoding) -> Identities:
    priors = {f"prior_{part}": place.identity() for part, place in _cascade_priors(settings).items()}
    return {**_identity(settings, CASCADE_DECODER), **priors}


class CascadeDecoder:
    """Stable Cascade, told an empty prompt: the prior draws its latent from the embedding, the decoder the picture from
    that latent; the noise of both comes from one generator, in this order.

    Rows are drawn one at a time: of a batch of B prompts the prior repeats the given embeddings B times.
    """

    def __init__(self, settings: EmbeddingDecoding, seed: int, device: str) -> None:
        from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline

        self.decode, self.seed, self.device = settings.decode, seed, device
        # The other half precision overflows in the prior.
        self.dtype = unasked_dtype(device, torch.bfloat16)
        decode, decoders = settings.decode, _places(settings, CASCADE_DECODER)
        self.prior = self._pipe(StableCascadePriorPipeline, str(decode.prior), None, _cascade_priors(settings))
        self.decoder = self._pipe(StableCascadeDecoderPipeline, decode.model, decode.revision, decoders)

    def _pipe(self, kind: Any, model: str, revision: str | None, places: Mapping[str, Place]) -> Any:
        """One of the two, put together by hand: diffusers moved the autoencoder's class, and `from_pretrained` does not
        find it (0.42)."""
        import diffusers
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        kinds = {"text_encoder": CLIPTextModelWithProjection, "vqgan": get_type_hints(kind.__init__).get("vqgan")}
        where = here(model)
        try:
            config = kind.load_config(where, revision=revision)
            networks = {
                part: place.load(kinds.get(part, diffusers.StableCascadeUNet), self.dtype)
                for part, place in places.items()
            }
            words = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", revision=revision)
            scheduler = getattr(diffusers, config["scheduler"][1])
            steps = scheduler.from_pretrained(where, subfolder="scheduler", revision=revision)
        except (OSError, ValueError) as error:
            raise DecoderError(f"{model}: Stable Cascade cannot be loaded from here: {error}") from None
        scales = {name: config[name] for name in ("latent_dim_scale", "resolution_multiple") if name in config}
        pipe = kind(tokenizer=words, scheduler=steps, **networks, **scales).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        for part in places:
            getattr(pipe, part).requires_grad_(False)
        return pipe

    def pictures(self, z_BE: torch.Tensor, keys: list[str]) -> list[Any]:
        return [self._picture(z_E, key) for z_E, key in zip(z_BE.to(self.device, self.dtype), keys, strict=True)]

    def _picture(self, z_E: torch.Tensor, key: str) -> Any:
        generator = row_generator(self.seed, key, "decode")
        size = {} if self.decode.size is None else {"height": self.decode.size, "width": self.decode.size}
        latent = self.prior(
            prompt="", image_embeds=z_E[None, None], num_inference_steps=self.decode.steps,
            guidance_scale=self.decode.guidance, generator=generator, **size,
        ).image_embeddings  # fmt: skip
        return self.decoder(image_embeddings=latent, prompt="", generator=generator).images[0]


# --- IP-Adapter ------------------------------------------------------------------------------------------------------


def adapter_file(adapter: IPAdapter) -> Path:
    """Its file on this machine; from the hub it is downloaded once.

    Raises:
        DecoderError: There is none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        local = Path(here(adapter.path))
        if local.is_file() and local.suffix == ".safetensors":
            return local
        owner, name, *rest = adapter.path.split("/")
        if not local.is_absolute() and rest and rest[-1].endswith(".safetensors"):
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(rest)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DecoderError(f"ip_adapter {adapter.path!r} is neither here nor on the hub: {reason}") from None
    raise DecoderError(f"ip_adapter {adapter.path!r}: there is no .safetensors file; name the file itself")


def _adapter_shapes(adapter: IPAdapter) -> dict[str, list[int]]:
    """Name -> shape of what stands in its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(adapter_file(adapter)), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise DecoderError(f"ip_adapter {adapter.path!r} cannot be read: {error}") from None


def _is_plus(shapes: Mapping[str, list[int]]) -> bool:
    """Told as diffusers tells it: FaceID Plus has its parts under other names."""
    return {"image_proj.latents", "image_proj.proj_in.weight"} <= shapes.keys()


def _adapter_width(settings: EmbeddingDecoding) -> int:
    adapter = settings.decode.ip_adapter
    assert adapter is not None
    shapes = _adapter_shapes(adapter)
    if _is_plus(shapes):
        return int(shapes["image_proj.proj_in.weight"][1])
    if "image_proj.proj.weight" in shapes:
        return int(shapes["image_proj.proj.weight"][1])
    raise DecoderError(
        f"ip_adapter {adapter.path!r} is neither of the plain kind, which takes one embedding (no "
        "image_proj.proj.weight), nor a Plus, which takes all hidden states (no image_proj.latents and proj_in)"
    )


def _adapter_length(settings: EmbeddingDecoding) -> int | None:
    """T of an IP-Adapter Plus, from the configuration of the image encoder; None for the plain kind.

    Raises:
        DecoderError: No encoder is named, or one of another width.
    """
    adapter = settings.decode.ip_adapter
    assert adapter is not None
    if not _is_plus(_adapter_shapes(adapter)):
        return None
    takes = _adapter_width(settings)
    if settings.encoder is None:
        raise DecoderError(
            f"ip_adapter {adapter.path!r} takes all hidden states of an image encoder, and guidance contrasts with "
            "those of an all-zero picture: set `encoder` to the encoder of the states"
        )
    length, width = clip.states_shape(settings.encoder, settings.revision)
    if width != takes:
        raise DecoderError(
            f"ip_adapter {adapter.path!r} takes states of width {takes}, those of the encoder {settings.encoder} have "
            f"{width}"
        )
    return length


def _adapter_identity(settings: EmbeddingDecoding, parts: tuple[str, ...]) -> Identities:
    adapter = settings.decode.ip_adapter
    assert adapter is not None
    mark = {"path": adapter.path, "revision": "", "fingerprint": sha256(adapter_file(adapter))}
    found = {**_identity(settings, parts), "ip_adapter": mark}
    if _adapter_length(settings) is not None:
        pickles, encoder = settings.allow_pickle, str(settings.encoder)
        found["image_encoder"] = clip.identity(encoder, "image", settings.revision, allow_pickle=pickles)
    return found


class IPAdapterDecoder(StockDecoder):
    """Stable Diffusion 1.5 or XL with an IP-Adapter. Guidance contrasts with an embedding of zeros, or of an adapter
    Plus with the hidden states of an all-zero picture, as the pipeline does where it encodes a picture itself.

    Rows are drawn one at a time: of a batch of B prompts the pipeline repeats the given embeddings B times, meaning one
    picture for all prompts, and its attention then folds the B B of them into B rows, which mixes them without a word.
    """

    def __init__(self, settings: EmbeddingDecoding, seed: int, device: str, *, xl: bool) -> None:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        left_out = {"image_encoder": None, "feature_extractor": None}
        if xl:
            super().__init__(settings, StableDiffusionXLPipeline, XL_PARTS, seed, device, **left_out)
        else:
            left_out["safety_checker"] = None
            super().__init__(
                settings, StableDiffusionPipeline, SD_PARTS, seed, device, **left_out, requires_safety_checker=False
            )
        adapter = settings.decode.ip_adapter
        assert adapter is not None
        file = adapter_file(adapter)
        try:
            self.pipe.load_ip_adapter(
                str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None
            )  # fmt: skip
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DecoderError(f"ip_adapter {adapter.path!r} does not fit {settings.decode.model}: {reason}") from None
        self.pipe.set_ip_adapter_scale(adapter.scale)
        self.zeros_TD: torch.Tensor | None = None
        if _adapter_length(settings) is not None and settings.decode.guidance > 1:
            encoder = clip.ImageEncoder(
                str(settings.encoder), settings.revision, device, allow_pickle=settings.allow_pickle
            )  # fmt: skip
            self.zeros_TD = encoder.zero_states()

    def pictures(self, z_BE: torch.Tensor, keys: list[str]) -> list[Any]:
        return [super(IPAdapterDecoder, self).pictures(z_BE[b : b + 1], [key])[0] for b, key in enumerate(keys)]

    def conditions(self, z_BE: torch.Tensor) -> dict[str, Any]:
        z_B1E = z_BE[:, None]
        zeros = torch.zeros_like(z_B1E) if self.zeros_TD is None else self.zeros_TD[None, None].to(z_B1E)
        return {"ip_adapter_image_embeds": [torch.cat([zeros, z_B1E]) if self.decode.guidance > 1 else z_B1E]}


KANDINSKY = Kind(_kandinsky_width, _kandinsky_identity, _kandinsky)
UNCLIP = Kind(_unclip_width, lambda settings: _identity(settings, UNCLIP_PARTS), UnCLIPDecoder)
CASCADE = Kind(_cascade_width, _cascade_identity, CascadeDecoder)
IP_SD = Kind(
    _adapter_width, lambda settings: _adapter_identity(settings, SD_PARTS),
    lambda settings, seed, device: IPAdapterDecoder(settings, seed, device, xl=False), _adapter_length,
)  # fmt: skip
IP_XL = Kind(
    _adapter_width, lambda settings: _adapter_identity(settings, XL_PARTS),
    lambda settings, seed, device: IPAdapterDecoder(settings, seed, device, xl=True), _adapter_length,
)  # fmt: skip
KINDS = {
    "KandinskyV22Pipeline": KANDINSKY, "StableUnCLIPImg2ImgPipeline": UNCLIP,
    "StableCascadeDecoderPipeline": CASCADE,
    "StableDiffusionPipeline": IP_SD, "StableDiffusionXLPipeline": IP_XL,
}  # fmt: skip
"""Class of a pipeline -> what draws with it."""
