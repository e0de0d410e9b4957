"""What every latent generative model offers: the only way in which a stage touches a family of models.

A family (`stages.models.unet`, `sd3`, `flux`, ...) implements `LatentModel`; `stages.models.families` finds the one
that a folder belongs to. What only its own pipeline does stays inside: packing of latents, shift and scale, the
network's idea of time and sign, guidance, the pipeline's own sigmas.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents as the denoiser sees them (scaled, float32); `m_BCHW` the
denoiser's output; L text tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from stages.engine.room import Rooms
from stages.models.captions import Reader
from stages.models.copies import here
from stages.models.fingerprint import describe_model, digest
from stages.models.flow_schedule import FlowGrid, flow_schedule
from stages.models.learned_words import LearnedWord, fingerprints_with
from stages.models.loras import Lora
from stages.models.multistep import Multistep
from stages.models.schedule import Schedule, ddim_schedule
from stages.models.stock_schedule import stock_schedule
from stages.models.usage import Usage
from stages.models.weights import weights_of
from stages.models.words import Encoder

Condition = dict[str, torch.Tensor]
"""What the denoiser is told beside latent and time: tensors with B first. `text_BLE` is the text; what else there is
depends on the family. Under guidance, ``null_NAME`` is NAME under the negative prompt; a name without one is shared.
Shapes are the same in every row: texts of unequal length are padded, with `mask_BL` saying what is text."""

Predict = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]
"""m_BCHW = predict(z_BCHW, t_B, condition): rows may stand at different times."""

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""m_BCHW of null_BCHW, under the negative prompt, and text_BCHW, under the prompt."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a network's weights lie.

    Attributes:
        path, revision: Folder or hub id, and what of it.
        folder: In it; "" for the top.
        variant, allow_pickle: Which of its weights; see `stages.models.weights.weights_of`.
    """

    path: str
    revision: str | None
    folder: str
    variant: str | None = None
    allow_pickle: bool = False

    def load(self, kind: Any, dtype: torch.dtype, **options: Any) -> Any:
        """The network, of a class of diffusers or transformers; `options` of its `from_pretrained`."""
        weights = weights_of(
            self.path, self.revision, self.folder, variant=self.variant, allow_pickle=self.allow_pickle
        )
        return kind.from_pretrained(
            here(self.path),
            subfolder=self.folder,
            revision=self.revision,
            dtype=dtype,
            **weights.options,
            **options,
        )

    def identity(self) -> dict[str, str]:
        """Path, revision and fingerprint of the weights that `load` reads."""
        return describe_model(
            self.path, self.revision, self.folder, variant=self.variant, allow_pickle=self.allow_pickle
        )


class Network(Protocol):
    """Where a network is read from: a `Place`, or a part of a checkpoint of one file."""

    def load(self, kind: Any, dtype: torch.dtype, **options: Any) -> Any:
        """The network, of a class of diffusers or transformers; `options` of its `from_pretrained`."""

    def identity(self) -> dict[str, str]:
        """Path, revision and fingerprint of the weights that `load` reads."""


@dataclass(frozen=True)
class Sizes:
    """Which pictures a model takes.

    Attributes:
        model: Its path, for errors.
        factor: Pixels along a side of a latent.
        multiple: Sides are multiples of it, in pixels.
        own: Side of the pictures that the pipeline draws where it is told none, in pixels; None: tell it always.
        largest: Longest side, in pixels; None: any.
    """

    model: str
    factor: int
    multiple: int
    own: int | None = None
    largest: int | None = None

    def check(self, width: int, height: int) -> None:
        """Refuse a size.

        Raises:
            ValueError: The model does not take pictures of that size.
        """
        for side in (width, height):
            if side < 1 or side % self.multiple:
                raise ValueError(f"size {side} is no multiple of {self.multiple}, which model {self.model!r} needs")
            if self.largest is not None and side > self.largest:
                raise ValueError(f"size {side} is more than the {self.largest} pixels that model {self.model!r} takes")


@dataclass(frozen=True)
class Geometry:
    """What a model's configuration says before any weight is loaded.

    Attributes:
        width, height: Of a picture, in pixels.
        latent_shape: (C, H, W) of its latents.
        sizes: Which pictures the model takes.
        scaling_factor: Latents are the posterior's mean times this.
        scheduler: The scheduler's configuration, with the settings' changes.
        text_shape: (L, E) of a text condition.
        guiding: How the model is guided: by an output under a second, negative prompt; by a number that the denoiser is
            told; not at all (it was distilled without).
        text_tokens: Tokens of a prompt that a rectified flow's language model is given; None: none has a say.
        upcast: The autoencoder runs in float32 beside networks in half precision.
        word_widths: Width of each text encoder's input embeddings: what a new word consists of.
        parts: The networks that results depend on, the denoiser first.
        loras: What is added to all of them but the autoencoder.
        words: What prompts may hold beside the words of the tokenizers.
        usage: Lines for cards.
        sampler: Whose steps are inverted and run: DDIM's over the scheduler's noise levels, or the scheduler's own.
        grid: How the pipeline of a rectified flow sets its scheduler; None: a variance-preserving chain.
        recordable: A pass of the denoiser is the same work whatever it is given, all of it the device's: it can be
            recorded as a CUDA graph.
    """

    width: int
    height: int
    latent_shape: tuple[int, int, int]
    sizes: Sizes
    scaling_factor: float
    scheduler: Mapping[str, Any]
    text_shape: tuple[int, int]
    upcast: bool
    word_widths: tuple[int, ...]
    parts: Mapping[str, Network]
    loras: tuple[Lora, ...]
    usage: Usage
    sampler: Literal["ddim", "model"] = "ddim"
    grid: FlowGrid | None = None
    guiding: Literal["classifier-free", "told", "none"] = "classifier-free"
    words: tuple[LearnedWord, ...] = ()
    text_tokens: int | None = None
    recordable: bool = True

    def at(self, width: int, height: int) -> Geometry:
        """The geometry of pictures of another size.

        Raises:
            ValueError: The model does not take them.
        """
        factor = self.sizes.factor
        self.sizes.check(width, height)
        shape = (self.latent_shape[0], height // factor, width // factor)
        return replace(self, width=width, height=height, latent_shape=shape)

    def check_guidance(self, guidance: float, negative: str | None) -> None:
        """Refuse a guidance or a negative prompt that the model does not heed.

        Raises:
            ValueError: There is one.
        """
        if guidance > 1 and self.guiding == "none":
            raise ValueError(
                f"guidance: model {self.sizes.model!r} has none (it was distilled without): leave `guidance` at 1"
            )
        if negative and self.guiding != "classifier-free":
            raise ValueError(
                f"negative: model {self.sizes.model!r} has no negative prompt, since its guidance is not of two "
                "prompts: leave `negative` out"
            )

    def refuse_flow(self, why: str) -> None:
        """For what is made for a variance-preserving diffusion.

        Raises:
            ValueError: This is a rectified flow.
        """
        if self.grid is not None:
            raise ValueError(
                f"model {self.sizes.model!r} is a rectified flow, and {why}: take Stable Diffusion 1.x, 2.x or XL"
            )

    @property
    def picture_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def says_size(self) -> bool:
        """Whether the pipeline has to be told the size."""
        return not self.width == self.height == self.sizes.own

    def schedule(self, steps: int) -> Schedule | Multistep:
        """The sampler's coefficients.

        Raises:
            ValueError: A sampler or a number of steps without an inverse.
        """
        if self.grid is not None:
            return flow_schedule(self.scheduler, steps, self.grid, self.latent_shape)
        if self.sampler == "model":
            return stock_schedule(self.scheduler, steps)
        return ddim_schedule(self.scheduler, steps)

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Part -> path, revision and fingerprint, for `pipeline.contract.StageInfo.models`."""
        found = {part: network.identity() for part, network in self.parts.items()}
        if self.loras:
            marks = [lora.mark() for lora in self.loras]
            for part in found.keys() - {"vae"}:
                found[part]["fingerprint"] = digest([found[part]["fingerprint"], marks])
        bare = {part: found[part]["fingerprint"] for part in found if part.startswith("text_encoder")}
        for part, fingerprint in fingerprints_with(self.words, bare).items():
            found[part]["fingerprint"] = fingerprint
        return found


@runtime_checkable
class LatentModel(Protocol):
    """A frozen text-to-image model that works on latents.

    Latents and the denoiser's output are float32 whatever the networks' types: rounding latents to half precision at
    each of 50 steps would cost more than any method of inversion gains.
    """

    @property
    def geometry(self) -> Geometry: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Part -> type of its weights."""

    @property
    def rooms(self) -> Rooms:
        """Rows that the device takes at once, by kind of work: ``predict``, ``encode``, ``decode`` and ``draw``, which
        the model's own calls keep to, and what its users remember beside the model."""

    @property
    def text_encoders(self) -> tuple[Encoder, ...]:
        """The encoders that new words can be taught to (`stages.models.words`)."""

    @property
    def readers(self) -> tuple[Reader, ...]:
        """What reads a prompt, for `stages.models.captions.token_counts`."""

    def at(self, width: int, height: int) -> LatentModel:
        """The same networks for pictures of another size.

        Raises:
            ValueError: The model does not take them.
        """

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """z_BCHW of pictures: the mean of the autoencoder's posterior, scaled."""

    def posterior(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z_BCHW and std_BCHW of pictures: mean and standard deviation of the posterior, scaled."""

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """x_BCHW (about [-1, 1], not clamped) of latents; differentiable."""

    def condition(self, prompts: Sequence[str], *, guided: bool = False, negative: str | None = None) -> Condition:
        """The condition of each prompt, as the model's own pipeline would make it.

        Args:
            prompts: One a row; "" is the model's empty prompt.
            guided: Also give the negative condition, which guidance above 1 needs.
            negative: The negative prompt; the model's empty one when None.
        """

    def text_condition(self, text_BLE: torch.Tensor, pooled_BE: torch.Tensor | None = None) -> Condition:
        """The condition of text latents instead of prompts; differentiable.

        Raises:
            ValueError: The model needs a pooled text latent and there is none.
        """

    def predictor(self, guidance: float = 1.0) -> Predict:
        """The denoiser under guidance, as the family has it: classifier-free, or told to the network; at 1 without."""

    def combination(self, guidance: float) -> Combine:
        """What `predictor` makes of the outputs under the negative prompt and under the prompt, where the model is
        guided by two (`Geometry.guiding`)."""

    def schedule(self, steps: int) -> Schedule | Multistep:
        """The deterministic sampler's coefficients, on the model's device."""

    def draw(
        self, condition: Condition, *, steps: int, guidance: float, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """z_0 of new pictures by the model's own pipeline and scheduler, each from its generator's noise."""

    def activation_bytes(self, call: Literal["predict", "encode", "decode"], *, gradient: bool = False) -> int:
        """What one row adds to the device's memory at the peak of a call (with its backward pass: `gradient`), beside
        the weights. A guided `predict` is two rows."""

    def lies(self, call: Literal["predict", "encode", "decode"]) -> Mapping[torch.device, float]:
        """The devices that a call's network lies on, in its order -> the share of its weights on each."""

    def recompute(self, call: Literal["predict", "decode"]) -> bool:
        """From now on the backward pass of a call computes the network's blocks again instead of keeping what is in
        them (`stages.models.recompute`). False: nothing changes."""
