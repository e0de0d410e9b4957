"""What the families of rectified-flow transformers share: reading their folder, loading its parts, pictures, prompts.

A family (`sd3`, `flux`, ...) says what its pipeline's parts are, how it conditions and guides, and how the transformer
is called. With its own scheduler, which is the one that is inverted, it behaves as the diffusers pipeline of that
folder, so that latents found here regenerate their picture there.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents as the transformer sees them, unpacked; `v_BCHW` the
flow's velocity dz / dsigma; L text tokens, E their width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import torch

from stages.engine.device import chosen_devices, without_cudnn_attention
from stages.engine.room import Rooms
from stages.models import autoencoder, cards, quantized
from stages.models.captions import Reader
from stages.models.copies import here
from stages.models.files import CONFIG, INDEX, SCHEDULER, read_config
from stages.models.flow_schedule import FlowGrid, check_flow
from stages.models.guidance import classifier_free, guided
from stages.models.latent import Combine, Condition, Geometry, Network, Place, Predict, Sizes
from stages.models.loras import add_lora
from stages.models.memory import fitting, on_meta, peak_bytes, relieve
from stages.models.multistep import Multistep
from stages.models.origin import check_colours, check_vae, config_of_vae, lines
from stages.models.recompute import recompute
from stages.models.sampler import sample
from stages.models.schedule import Schedule, changed_config
from stages.models.settings import FLOW_SCHEDULERS, LatentModelSettings, SamplingSettings
from stages.models.usage import Usage, guidance_scale
from stages.models.words import Encoder

PICTURE_READERS = ("PixtralProcessor", "Qwen3VLProcessor")
"""Processors of transformers that read prompts, and pictures by torchvision."""


class FlowTransformer:
    """A transformer that predicts the velocity of a rectified flow. A `stages.models.latent.LatentModel`.

    The autoencoder runs in float32 whatever the other networks run in: its rounding would bound every picture's PSNR.

    Args:
        pipeline: Its pipeline of diffusers, loaded on the device.
        geometry: From its configuration.
    """

    index: ClassVar[str]
    """The class of its pipeline."""
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str] = "AutoencoderKL"
    colours: ClassVar[tuple[int, ...]] = (3,)
    """Channels that its autoencoder may take: 4, of pictures with alpha."""
    encoders: ClassVar[Mapping[str, str]]
    """Text encoder -> its tokenizer."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Text encoders that a folder may lack."""
    left_out: ClassVar[Mapping[str, Any]] = {}
    """Not loaded, and need not be there: what takes pictures as prompts."""
    grid: ClassVar[FlowGrid]
    tokens: ClassVar[int] = 512
    """Of a prompt that the pipeline gives its language model (the last encoder), unless told otherwise."""
    most_tokens: ClassVar[int] = 512
    """That it can be told to."""
    mixed: ClassVar[frozenset[str]] = frozenset()
    """Lists of the transformer's blocks whose results it puts together itself: on one card (`stages.models.cards`)."""
    latents: ClassVar[str] = "seed"
    """See `Usage`."""
    recordable: ClassVar[bool] = True
    """See `Geometry`."""
    packed: ClassVar[int] = 1
    """Latents of one channel that the transformer takes as channels of one token."""

    @staticmethod
    def guidance_options(guidance: float, negative: str | None) -> str:
        """See `Usage`."""
        return guidance_scale(guidance, negative)

    def __init__(self, pipeline: Any, geometry: Geometry) -> None:
        self.pipeline, self.geometry = pipeline, geometry
        for part in geometry.parts:
            getattr(pipeline, part).eval().requires_grad_(False)
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.device: torch.device = self.transformer.device
        self.dtypes = {part: getattr(pipeline, part).dtype for part in geometry.parts}
        self.rooms = Rooms(self.device, partial(fitting, self), partial(relieve, self))

    # --- from a folder

    @classmethod
    def sizes(cls, path: str, transformer: Mapping[str, Any], factor: int) -> Sizes:
        """Which pictures the model takes."""
        return Sizes(path, factor, factor * cls.grid.patch)

    @classmethod
    def grid_of(cls, index: Mapping[str, Any]) -> FlowGrid:
        """How its pipeline sets its scheduler; of the pipeline's configuration."""
        return cls.grid

    @classmethod
    def default_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], factor: int) -> int:
        """Side of a picture where no size is asked for."""
        return int(vae["sample_size"])

    @classmethod
    def text_shape(cls, transformer: Mapping[str, Any], tokens: int) -> tuple[int, int]:
        """(L, E) of a text condition, of so many tokens of the language model."""
        return tokens, int(transformer["joint_attention_dim"])

    @classmethod
    def guiding(
        cls, index: Mapping[str, Any], transformer: Mapping[str, Any]
    ) -> Literal["classifier-free", "told", "none"]:
        """See `Geometry`; of the configurations of pipeline and transformer."""
        return "classifier-free"

    @classmethod
    def text_tokens(cls, settings: LatentModelSettings) -> int:
        """Tokens of a prompt that the language model is given.

        Raises:
            ValueError: More are asked for than the pipeline takes.
        """
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        asked = settings.max_sequence_length
        if asked is not None and asked > cls.most_tokens:
            raise ValueError(
                f"max_sequence_length is {asked}: the {cls.index} of model {settings.model!r} takes up to "
                f"{cls.most_tokens}"
            )
        if asked is not None:
            return asked
        tokenizer = list(cls.encoders.values())[-1]
        own = get_tokenizer_config(here(settings.model), subfolder=tokenizer, revision=settings.revision or "main")
        return min(cls.tokens, int(own.get("model_max_length") or cls.tokens))

    @classmethod
    def check(cls, path: str, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        """Refuse a relative of the family that takes more than text.

        Raises:
            ValueError: It is one.
        """
        channels = int(transformer["in_channels"]) // cls.packed
        if channels != cls.channels(vae):
            raise ValueError(
                f"model {path!r} takes {channels} channels, its autoencoder gives {cls.channels(vae)}: one that takes "
                "a picture beside the text cannot be inverted here"
            )
        check_colours(path, int(vae.get("in_channels") or vae.get("input_channels") or 3), cls.colours)

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        return int(vae["latent_channels"])

    @classmethod
    def factor(cls, vae: Mapping[str, Any]) -> int:
        """Pixels along a side of a latent."""
        return int(2 ** (len(vae["block_out_channels"]) - 1))

    @classmethod
    def read_geometry(cls, settings: LatentModelSettings) -> Geometry:
        """Read the configuration; loads no weights.

        Raises:
            ValueError: Not such a model, or one that cannot be inverted, or a size that it does not take.
        """
        path = settings.model
        parts = cls._parts(settings)
        transformer, vae, scheduler = cls._configurations(settings)
        cls.check(path, transformer, vae)
        quantized.check_quantization(
            settings.quantization_config, path, parts, cls.encoders, settings.device, one_file=False
        )
        if settings.words:
            raise ValueError(f"words: {path!r} takes no learned words; Stable Diffusion 1.x, 2.x and XL do")
        if settings.vae is not None and cls.vae_class != "AutoencoderKL":
            raise ValueError(f"vae: model {path!r} has an {cls.vae_class}, whose place no other takes; leave out `vae`")
        if settings.vae is not None:
            check_vae(settings.vae, vae, path)
        effective = changed_config(scheduler, settings.scheduler)
        if effective.get("_class_name") not in FLOW_SCHEDULERS:
            raise ValueError(
                f"model {path!r} is a {cls.index}, whose rectified flow a {effective.get('_class_name')} does not run "
                f"as a chain of invertible steps: set scheduler: {{class: {FLOW_SCHEDULERS[0]}}}"
            )
        check_flow(effective)
        factor = cls.factor(vae)
        sizes = cls.sizes(path, transformer, factor)
        size = settings.size or cls.default_size(transformer, vae, factor)
        sizes.check(size, size)
        tokens = cls.text_tokens(settings)
        return Geometry(
            width=size,
            height=size,
            latent_shape=(cls.channels(vae), size // factor, size // factor),
            sizes=sizes,
            scaling_factor=float(vae.get("scaling_factor", 1.0)),
            scheduler=effective,
            text_shape=cls.text_shape(transformer, tokens),
            guiding=cls.guiding(cls._index(settings), transformer),
            text_tokens=tokens,
            upcast=True,
            word_widths=(),
            parts=parts,
            loras=tuple(settings.loras or ()),
            usage=cls._usage(settings, parts, tokens),
            sampler="model",
            grid=cls.grid_of(cls._index(settings)),
            recordable=cls.recordable,
        )

    @classmethod
    def _index(cls, settings: LatentModelSettings) -> dict[str, Any]:
        return read_config(settings.model, INDEX, revision=settings.revision)

    @classmethod
    def _parts(cls, settings: LatentModelSettings) -> dict[str, Network]:
        """Where each network is read from, the transformer first."""
        index = cls._index(settings)
        needed = ["transformer", "vae", *(part for part in cls.encoders if part not in cls.optional)]
        for part in (*needed, *(cls.encoders[name] for name in needed[2:]), "scheduler"):
            local = Path(here(settings.model)).expanduser()
            if not _class_of(index, part) or (local.is_dir() and not (local / part).is_dir()):
                raise ValueError(f"model {settings.model!r} lacks its {part}, which a {cls.index} consists of")
        for part, name in (("transformer", cls.transformer_class), ("vae", cls.vae_class)):
            if _class_of(index, part) != name:
                raise ValueError(f"model {settings.model!r}: its {part} is a {_class_of(index, part)}, not a {name}")
        there = [part for part in cls.encoders if part in needed or _class_of(index, part)]
        parts: dict[str, Network] = {
            part: Place(
                settings.model, settings.revision, part, None if part == "vae" else settings.variant,
                bool(settings.allow_pickle),
            )
            for part in ("transformer", "vae", *there)
        }  # fmt: skip
        if settings.vae is not None:
            folder = config_of_vae(settings.vae)[1]
            parts["vae"] = Place(settings.vae, None, folder, allow_pickle=bool(settings.allow_pickle))
        return parts

    @classmethod
    def _configurations(
        cls, settings: LatentModelSettings
    ) -> tuple[Mapping[str, Any], Mapping[str, Any], dict[str, Any]]:
        """Of transformer, autoencoder and scheduler; of the networks with what the folder leaves out.

        Raises:
            ValueError: One cannot be read.
        """
        found = []
        for part, name in (("transformer", CONFIG), ("vae", CONFIG), ("scheduler", SCHEDULER)):
            try:
                found.append(read_config(settings.model, name, folder=part, revision=settings.revision))
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"model {settings.model!r} lacks its {part}, or it cannot be read: {reason}"
                ) from error
        return WithDefaults(found[0], cls.transformer_class), WithDefaults(found[1], cls.vae_class), found[2]

    @classmethod
    def load(cls, settings: LatentModelSettings, geometry: Geometry) -> Self:
        """Read the weights, each part in the type that it runs in, onto the device.

        Raises:
            ValueError: What reads its prompts asks for torchvision, which is not installed.
        """
        import diffusers
        import transformers

        index, devices = cls._index(settings), chosen_devices(settings.device)
        for reads in (_class_of(index, part) for part in cls.encoders.values()):
            if reads in PICTURE_READERS and find_spec("torchvision") is None:
                raise ValueError(f"model {settings.model!r} reads prompts by a {reads}: pip install torchvision")
        loaded: dict[str, Any] = dict(cls.left_out)
        stay = cls.encoders if isinstance(settings, SamplingSettings) and settings.offload else ()
        homes = {part: devices[-1 if part in cls.encoders else 0] for part in geometry.parts.keys() - set(stay)}
        lies: cards.DeviceMap = {}
        # The transformer last: it shares what room the others leave.
        for part in sorted(geometry.parts, key=lambda part: part == "transformer"):
            library: Any = transformers if part in cls.encoders else diffusers
            kind: Any = getattr(library, _class_of(index, part))
            dtype: torch.dtype = torch.float32 if part == "vae" else getattr(torch, settings.dtype)
            named = quantized.loading(settings.quantization_config, part, by_transformers=part in cls.encoders)
            if len(devices) > 1 and part == "transformer":
                lies = cls._spread(settings, on_meta(kind, cls._configurations(settings)[0], dtype), devices)
                named |= {} if geometry.loras else {"device_map": lies}
            elif len(devices) > 1 and named:
                named["device_map"] = {"": homes.get(part, devices[-1])}
            loaded[part] = geometry.parts[part].load(kind, dtype, **named)
            if part in homes and not lies and not geometry.loras:
                quantized.place(loaded[part], homes[part])
        for part in cls.encoders.keys() - geometry.parts.keys():
            loaded |= {part: None, cls.encoders[part]: None}
        pipeline = getattr(diffusers, cls.index).from_pretrained(
            here(settings.model), revision=settings.revision, **loaded
        )
        for lora in geometry.loras:
            add_lora(pipeline, lora)
        sampler: Any = getattr(diffusers, FLOW_SCHEDULERS[0])
        pipeline.scheduler = sampler.from_config(dict(geometry.scheduler))
        pipeline.set_progress_bar_config(disable=True)
        for part, home in homes.items():
            if lies and part == "transformer":
                cards.dispatch(pipeline.transformer, lies)
            else:
                quantized.place(getattr(pipeline, part), home)
        return cls(pipeline, geometry)

    @classmethod
    def _spread(cls, settings: LatentModelSettings, on_meta: Any, devices: Sequence[str]) -> cards.DeviceMap:
        """Where the transformer's parts lie on several cards.

        Raises:
            ValueError: They do not fit, or it cannot be shared out.
        """
        is_quantised = "transformer" in (settings.quantization_config or {})
        if is_quantised and settings.loras:
            raise ValueError(
                f"model {settings.model!r}: a quantised transformer takes no `loras` on several cards: leave out one "
                "of `loras` and `quantization_config`, or take one card a worker"
            )
        room = cards.room_on(devices)
        if is_quantised:  # how small it becomes is not known here: in these proportions
            room = [free * cards.weights_of(on_meta) // max(1, *room) for free in room]
        try:
            return cards.spread(on_meta, devices, room, cls.mixed)
        except ValueError as error:
            raise ValueError(
                f"model {settings.model!r}: its transformer does not fit on {', '.join(devices)} beside what lies "
                f"there ({error}): take more `resources.gpus` a worker, `offload: text-encoders`, or a "
                "`quantization_config`"
            ) from None

    @classmethod
    def without_weights(cls, settings: LatentModelSettings, geometry: Geometry) -> Self:
        """Transformer and autoencoder on the meta device, for `activation_bytes` alone."""
        import diffusers

        transformer, vae, _ = cls._configurations(settings)
        own = vae if settings.vae is None else config_of_vae(settings.vae)[0]
        pipeline = SimpleNamespace(
            transformer=on_meta(getattr(diffusers, cls.transformer_class), transformer, getattr(torch, settings.dtype)),
            vae=on_meta(getattr(diffusers, cls.vae_class), own, torch.float32),
        )
        return cls(pipeline, replace(geometry, parts={part: geometry.parts[part] for part in ("transformer", "vae")}))

    @classmethod
    def _usage(cls, settings: LatentModelSettings, parts: Mapping[str, Network], tokens: int) -> Usage:
        without = [name for pair in cls.encoders.items() if pair[0] not in parts for name in pair]
        names, pipeline = lines(settings, cls.index, "transformer", without, encoders=list(cls.encoders))
        changes = {key: value for key, value in (settings.scheduler or {}).items() if key != "class"}
        sampler: tuple[str, ...] = ()
        swap = ""
        if settings.scheduler:
            sampler = FLOW_SCHEDULERS
            options = "".join(f", {key}={value!r}" for key, value in changes.items())
            swap = f"pipe.scheduler = {FLOW_SCHEDULERS[0]}.from_config(pipe.scheduler.config{options})"
        more = "" if tokens == cls.tokens else f"max_sequence_length={tokens}, "
        return Usage(
            tuple(names), pipeline, sampler, swap, {}, latents=cls.latents, guidance=cls.guidance_options, more=more
        )

    def at(self, width: int, height: int) -> Self:
        model = copy.copy(self)
        model.geometry = self.geometry.at(width, height)
        return model

    # --- pictures

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.rooms["encode"](partial(autoencoder.encode, self.vae), x_BCHW)

    def posterior(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return autoencoder.posterior(self.vae, x_BCHW)

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        return self.rooms["decode"](partial(autoencoder.decode, self.vae), z_BCHW)

    # --- prompts

    @property
    def text_encoders(self) -> tuple[Encoder, ...]:
        """None: new words are not taught to these models."""
        return ()

    @property
    def readers(self) -> tuple[Reader, ...]:
        there = [(part, name) for part, name in self.encoders.items() if part in self.geometry.parts]
        return tuple(Reader(getattr(self.pipeline, name), self.limit(part), part) for part, name in there)

    @property
    def length(self) -> int:
        """Tokens that the language model is given."""
        assert self.geometry.text_tokens is not None
        return self.geometry.text_tokens

    def limit(self, encoder: str) -> int:
        """Tokens that a text encoder is given: the last one is the language model, others are CLIP's."""
        return self.length if encoder == list(self.encoders)[-1] else int(self.pipeline.tokenizer_max_length)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], *, guided: bool = False, negative: str | None = None) -> Condition:
        here = [getattr(self.pipeline, part) for part in self.encoders if part in self.geometry.parts]
        with visiting(here, self.reads_on):
            found = self.encode_prompts(prompts, guided=guided, negative=negative)
        return {name: value.to(self.device) for name, value in found.items()}

    @property
    def reads_on(self) -> torch.device:
        """Where prompts are encoded: the last of the cards that the model lies on."""
        return list(self.lies("predict"))[-1]

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        """See `LatentModel.condition`; the text encoders are on `reads_on`, and what they give may be there."""
        raise NotImplementedError

    def text_condition(self, text_BLE: torch.Tensor, pooled_BE: torch.Tensor | None = None) -> Condition:
        if pooled_BE is None:
            raise ValueError(f"a {self.index} needs a pooled text embedding")
        return {"text_BLE": text_BLE, "pooled_BE": pooled_BE}

    # --- the transformer

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        """v_BCHW, float32, without guidance; of the transformer, or of another `network` of its shape."""
        raise NotImplementedError

    def predictor(self, guidance: float = 1.0) -> Predict:
        return self.in_parts() if guidance <= 1 else guided(self.in_parts(), self.combination(guidance))

    def combination(self, guidance: float) -> Combine:
        return classifier_free(guidance)

    def in_parts(self, **options: Any) -> Predict:
        """`forward`, with a family's own options, in parts that fit into the device's memory; where a gradient is asked
        for, by kernels that can be relied on for it."""

        def forward(*given: Any) -> torch.Tensor:
            with without_cudnn_attention() if torch.is_grad_enabled() else nullcontext():
                return self.forward(*given, **options)

        return partial(self.rooms["predict"], forward)

    def schedule(self, steps: int) -> Schedule | Multistep:
        return self.geometry.schedule(steps).to(self.device)

    @torch.no_grad()
    def draw(
        self, condition: Condition, *, steps: int, guidance: float, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        noise = [torch.randn(self.geometry.latent_shape, generator=one, device=one.device) for one in generators]
        noise_BCHW = torch.stack(noise).to(self.device)
        return sample(self.predictor(guidance), self.schedule(steps), noise_BCHW, condition)

    # --- memory

    def blank_condition(self) -> Condition:
        """One row's condition on the meta device."""
        length, width = self.geometry.text_shape
        text_BLE = torch.empty(1, length, width, device="meta")
        pooled = self.transformer.config.get("pooled_projection_dim")
        if pooled is None:
            return {"text_BLE": text_BLE, "mask_BL": torch.empty(1, length, dtype=torch.bool, device="meta")}
        return {"text_BLE": text_BLE, "pooled_BE": torch.empty(1, pooled, device="meta")}

    def activation_bytes(self, call: Literal["predict", "encode", "decode"], *, gradient: bool = False) -> int:
        """See `stages.models.latent.LatentModel`. Counted on the meta device by `stages.models.memory.peak_bytes`."""
        shape = self.geometry.latent_shape
        if call == "predict":
            z = torch.empty(1, *shape, device="meta")
            t = torch.ones(1, device="meta")
            told = self.blank_condition()
            return peak_bytes(self.transformer, lambda net: self.forward(z, t, told, net), z, gradient=gradient)
        pixels = (3, self.geometry.height, self.geometry.width)
        x = torch.empty(1, *(pixels if call == "encode" else shape), device="meta")
        run = autoencoder.encode if call == "encode" else autoencoder.decode
        return peak_bytes(self.vae, lambda net: run(net, x), x, gradient=gradient)

    def layout(self, count: int, card: int) -> list[int]:
        """Bytes of transformer and autoencoder on each of so many empty cards of one size; empty: they do not fit."""
        try:
            return cards.layout(self.transformer, count, card, cards.weights_of(self.vae), self.mixed)
        except ValueError:
            return []

    def lies(self, call: Literal["predict", "encode", "decode"]) -> Mapping[torch.device, float]:
        return cards.laid_out(self.transformer if call == "predict" else self.vae)

    def recompute(self, call: Literal["predict", "decode"]) -> bool:
        if call == "decode":
            return recompute(self.vae)
        return recompute(self.transformer, without_cudnn_attention)


@contextmanager
def visiting(networks: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Networks on a device for a while; those that wait elsewhere go back."""
    homes = [network.device for network in networks]
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network, home in zip(networks, homes, strict=True):
            network.to(home)


class PackedTransformer(FlowTransformer):
    """One whose tokens are 2 x 2 squares of latents (`pack`), at FLUX.1's noise levels."""

    grid = FlowGrid(linear="float64")
    latents = "pipe._pack_latents(seed, *seed.shape)"
    packed = 4


def unpadded(text_BLE: torch.Tensor, mask_BL: torch.Tensor | None) -> list[torch.Tensor]:
    """Texts (L, E), each as long as it is; None: all of them are whole."""
    if mask_BL is None:
        return list(text_BLE)
    return [text_LE[mask_L.bool()] for text_LE, mask_L in zip(text_BLE, mask_BL, strict=True)]


def padded(texts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts (L, E) of unequal length as text_BLE, with zeros behind, and mask_BL: what of it is text.

    Args:
        length: L of all; what is longer is cut.
    """
    text_BLE = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
    mask_BL = torch.zeros(len(texts), length, dtype=torch.bool, device=text_BLE.device)
    for i, text in enumerate(texts):
        text_BLE[i, : len(text)], mask_BL[i, : len(text)] = text[:length], True
    return text_BLE, mask_BL


def pack(z_BCHW: torch.Tensor) -> torch.Tensor:
    """Each 2 x 2 square of latents as one token of 4 C channels: (B, H W / 4, 4 C), as FLUX and Qwen-Image do."""
    B, C, H, W = z_BCHW.shape
    return z_BCHW.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)


def unpack(tokens_BNC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`; height and width of the latents."""
    B, _, C = tokens_BNC.shape
    z = tokens_BNC.reshape(B, height // 2, width // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(B, C // 4, height, width)


def _class_of(index: Mapping[str, Any], part: str) -> str:
    """The class of a pipeline's part, "" for one that is not there."""
    named = index.get(part)
    return str(named[1]) if named and named[1] else ""


class WithDefaults(Mapping[str, Any]):
    """A network's configuration; what the folder leaves out is its class's default, and only then is that imported.

    Args:
        kind: The class's name in diffusers.
    """

    def __init__(self, config: Mapping[str, Any], kind: str) -> None:
        self._config, self._kind = config, kind

    @cached_property
    def _all(self) -> dict[str, Any]:
        import diffusers

        known = inspect.signature(getattr(diffusers, self._kind)).parameters.values()
        return {value.name: value.default for value in known if value.default is not value.empty} | dict(self._config)

    def __getitem__(self, key: str) -> Any:
        return self._config[key] if key in self._config else self._all[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
