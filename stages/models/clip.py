"""CLIP-family encoders of transformers by folder or hub id: CLIP, OpenCLIP (converted), SigLIP, Kandinsky 2.2's prior.

Legend: B rows, E embedding width. Embeddings are the raw projected vectors, not normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from stages.engine.room import Room
from stages.models.copies import here
from stages.models.files import INDEX, read_config
from stages.models.fingerprint import describe_model
from stages.models.weights import weights_of

if TYPE_CHECKING:
    from PIL.Image import Image

Role = Literal["image", "text"]
TEXTS = 1024
"""Prompts at once: so many that those of one length, which go together, are many."""
_PARTS = {"image": ("image_encoder", "image_processor"), "text": ("text_encoder", "tokenizer")}


class ModelError(ValueError):
    """A model cannot be loaded; the message names it and says what is expected."""


@dataclass(frozen=True)
class Place:
    """Where an encoder's weights and its processor lie: subfolders of a pipeline, or none of a plain model."""

    path: str
    revision: str | None
    model: str = ""
    processor: str = ""

    def options(self, subfolder: str) -> dict[str, Any]:
        return {"revision": self.revision, **({"subfolder": subfolder} if subfolder else {})}


@lru_cache(maxsize=32)
def locate(path: str, role: Role, revision: str | None = None) -> Place:
    """Find an encoder in a diffusers pipeline (``image_encoder``, ``text_encoder``) or in a model of transformers.

    Raises:
        ModelError: There is neither, or the pipeline has no such part.
    """
    try:
        path = here(path)
    except OSError as error:
        raise ModelError(str(error)) from None
    try:
        parts = read_config(path, INDEX, revision=revision)
    except OSError:
        return Place(path, revision)
    encoder, processor = _PARTS[role]
    if encoder not in parts:
        raise ModelError(f"{path}: this pipeline has no {encoder}; name a prior pipeline, or a CLIP model")
    return Place(path, revision, encoder, processor)


def _config(place: Place) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place.path, **place.options(place.model))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{place.path}: no encoder can be loaded from here: {reason}") from None


def _tower_config(place: Place, role: Role) -> Any:
    """The configuration of one tower.

    A whole CLIP model names the width of its embeddings at the top; models converted from OpenCLIP repeat another one,
    the default, in the towers.
    """
    config = _config(place)
    tower = getattr(config, f"{'vision' if role == 'image' else 'text'}_config", None)
    if tower is None:
        return config
    if getattr(config, "projection_dim", None):
        tower.projection_dim = config.projection_dim
    return tower


def embedding_width(path: str, revision: str | None = None) -> int:
    """E, read from the configuration alone."""
    config = _config(locate(path, "image", revision))
    vision = getattr(config, "vision_config", config)
    if "siglip" in config.model_type:
        return int(vision.hidden_size)
    return int(getattr(config, "projection_dim", None) or vision.projection_dim)


def text_width(path: str, revision: str | None = None) -> int:
    """Width of the text embeddings, read from the configuration alone."""
    config = _config(locate(path, "text", revision))
    text = getattr(config, "text_config", config)
    if "siglip" in config.model_type:
        return int(text.projection_size)
    return int(getattr(config, "projection_dim", None) or text.projection_dim)


def vision_width(path: str, revision: str | None = None) -> int:
    """D, the image encoder's own width, read from the configuration alone."""
    config = _config(locate(path, "image", revision))
    return int(getattr(config, "vision_config", config).hidden_size)


def states_shape(path: str, revision: str | None = None, patches: int | None = None) -> tuple[int, int]:
    """(T, D) of the image encoder's hidden states, read from the configuration alone: its patches (or so many tokens in
    their place), behind a class token where it has one."""
    config = _config(locate(path, "image", revision))
    vision = getattr(config, "vision_config", config)
    own = (vision.image_size // vision.patch_size) ** 2 if patches is None else patches
    return own + ("siglip" not in config.model_type), int(vision.hidden_size)


def identity(
    path: str, role: Role, revision: str | None = None, *, allow_pickle: bool | None = None
) -> dict[str, str]:  # fmt: skip
    """Path, revision and fingerprint of an encoder, for `StageInfo.models`; loads no weights.

    Raises:
        ModelError: There is no such encoder.
        WeightsError: Its weights are in no form that is read.
    """
    folder = locate(path, role, revision).model
    try:
        described = describe_model(path, revision, folder, allow_pickle=bool(allow_pickle))
    except FileNotFoundError as error:
        raise ModelError(str(error)) from None
    return {**described, "path": path}


def blank(path: str, role: Role, revision: str | None = None) -> torch.nn.Module:
    """An encoder on the meta device: shapes and no numbers.

    Raises:
        ModelError: There is none.
    """
    from transformers import (
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
        SiglipTextModel,
        SiglipVisionModel,
    )

    place = locate(path, role, revision)
    siglip = "siglip" in _config(place).model_type
    kinds: dict[Role, Any] = {
        "image": SiglipVisionModel if siglip else CLIPVisionModelWithProjection,
        "text": SiglipTextModel if siglip else CLIPTextModelWithProjection,
    }
    with torch.device("meta"):
        network: torch.nn.Module = kinds[role](_tower_config(place, role))
    return network


def has_text_encoder(path: str, revision: str | None = None) -> bool:
    """Whether prompts can be encoded by what lies there: a pipeline's text encoder, or a model with a text tower."""
    try:
        place = locate(path, "text", revision)
        kind = _config(place)
    except ModelError:
        return False
    return hasattr(kind, "text_config") or kind.model_type.endswith("text_model")


def _load(loader: Any, place: Place, subfolder: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(place.path, **place.options(subfolder), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{place.path}/{subfolder}: cannot be loaded: {reason}") from None


def load_weights(loader: Any, place: Place, allow_pickle: bool | None, **options: Any) -> Any:
    """A network. That the folder holds the other tower's weights too goes unmentioned; that it lacks some does not.

    Raises:
        ModelError: It cannot be loaded, or weights are missing, which would be drawn at random.
    """
    from transformers.utils import logging

    try:
        weights = weights_of(place.path, place.revision, place.model, allow_pickle=bool(allow_pickle))
    except FileNotFoundError as error:
        raise ModelError(str(error)) from None
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = _load(loader, place, place.model, output_loading_info=True, **weights.options, **options)
    finally:
        logging.set_verbosity(before)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{place.path}/{place.model}: {len(missing)} weights are missing, among them {missing[0]}")
    return model


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), as transformers computes it and to the same bits, but in the memory of x and of one other
    tensor instead of four where no gradient is asked for: a quarter of a small text encoder's time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            return x * torch.sigmoid(1.702 * x)
        return x.mul_(torch.sigmoid_(1.702 * x))


def frugal(model: nn.Module) -> nn.Module:
    """The model of a tower, its layers' `QuickGELUActivation` replaced by `QuickGelu`, in place: each is given what
    the linear layer before it has just made, and nobody else holds."""
    from transformers.activations import QuickGELUActivation

    for module in list(model.modules()):
        if isinstance(getattr(module, "activation_fn", None), QuickGELUActivation):
            module.activation_fn = QuickGelu()
    return model


class LastLayer(nn.Module):
    """The last layer of a causal text tower. Where `read_B` holds a token's place for each row, for that one alone, and
    nothing for the others, which only that one looks at: their keys and values are a sixth of the layer's products."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.read_B: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *mask: Any, **options: Any) -> torch.Tensor:
        if self.read_B is None:
            whole_BLD: torch.Tensor = self.layer(hidden_states, *mask, **options)
            return whole_BLD
        x_BLD, attention = hidden_states, self.layer.self_attn
        (rows, length, width), heads = x_BLD.shape, attention.num_heads
        places_L = torch.arange(length, device=x_BLD.device)
        which = torch.arange(rows, device=x_BLD.device), self.read_B
        normed_BLD = self.layer.layer_norm1(x_BLD)
        q_BH1d = attention.q_proj(normed_BLD[which]).view(rows, heads, 1, -1)
        k_BHLd, v_BHLd = (
            project(normed_BLD).view(rows, length, heads, -1).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        before_B11L = (places_L <= self.read_B[:, None])[:, None, None]
        seen_BH1d = nn.functional.scaled_dot_product_attention(
            q_BH1d, k_BHLd, v_BHLd, attn_mask=before_B11L, scale=attention.scale
        )
        y_BD = x_BLD[which] + attention.out_proj(seen_BH1d.reshape(rows, width))
        read_BLD = torch.zeros_like(x_BLD)
        read_BLD[which] = y_BD + self.layer.mlp(self.layer.layer_norm2(y_BD))
        return read_BLD


class TextEncoder:
    """Prompts to text embeddings.

    Args:
        path: Folder or hub id of a prior pipeline or of a CLIP-family model.
        dtype: Weights' type; float32 on a CPU.
        allow_pickle: See `stages.models.weights.weights_of`.
        room: Prompts at once.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_pickle: bool | None = None,
        room: Room | None = None,
    ) -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, SiglipModel

        place = locate(path, "text", revision)
        self._siglip = "siglip" in _config(place).model_type
        if self._siglip:
            model = load_weights(SiglipModel, place, allow_pickle, dtype=dtype)
        else:
            config = _tower_config(place, "text")
            model = load_weights(CLIPTextModelWithProjection, place, allow_pickle, dtype=dtype, config=config)
        if not self._siglip:
            layers = model.text_model.encoder.layers
            layers[-1] = self._last = LastLayer(layers[-1])
        self.model: Any = frugal(model.text_model if self._siglip else model).to(device).eval().requires_grad_(False)
        self.tokenizer = _load(AutoTokenizer, place, place.processor)
        self.device, self.room = device, room or Room()
        positions = getattr(self.model.config, "max_position_embeddings", 77)
        self.length = min(positions, self.tokenizer.model_max_length)

    def __call__(self, prompts: Sequence[str], batch: int = TEXTS) -> torch.Tensor:
        """t_BE, float32 on the CPU. Prompts longer than the encoder's context are cut, as its pipelines cut them."""
        return self.counted(prompts, batch)[0]

    @torch.inference_mode()
    def counted(self, prompts: Sequence[str], batch: int = TEXTS) -> tuple[torch.Tensor, list[int]]:
        """The same, and how many tokens each prompt has, uncut, with those of its start and end."""

        def encoded(part: slice) -> tuple[torch.Tensor, list[int]]:
            ids_BL, mask_BL, counts = self._tokens(prompts[part])
            if self._siglip:  # trained without a mask
                return self.model(input_ids=ids_BL.to(self.device)).pooler_output, counts
            return self._causal(ids_BL.to(self.device), mask_BL.to(self.device)), counts

        out, counts = zip(*self.room.parts(len(prompts), encoded, batch), strict=True)
        return torch.cat(out).float().cpu().clone(), [*chain.from_iterable(counts)]

    def _tokens(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Ids and mask, cut and padded to the context as the tokenizer itself does it, and how many there were before:
        told from one pass over the text, and a second over those that are too long."""
        tokenizer, length = self.tokenizer, self.length
        read = tokenizer(
            list(prompts), verbose=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]  # fmt: skip
        counts = [len(ids) for ids in read]
        if long := [b for b, count in enumerate(counts) if count > length]:
            cut = tokenizer([prompts[b] for b in long], truncation=True, max_length=length)["input_ids"]
            for b, ids in zip(long, cut, strict=True):
                read[b] = ids
        held_B = torch.tensor([len(ids) for ids in read])[:, None]
        place_L = torch.arange(length)
        mask_BL = place_L < held_B if tokenizer.padding_side == "right" else place_L >= length - held_B
        ids_BL = torch.full(mask_BL.shape, tokenizer.pad_token_id)
        ids_BL[mask_BL] = torch.tensor(list(chain.from_iterable(read)))
        return ids_BL, mask_BL.long(), counts

    def _causal(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """t_BE. A token sees none behind it, so what stands behind a prompt's end changes nothing, needs no mask, and
        is left out: to the next multiple of 2, whatever the other prompts, so that a prompt's numbers are its own."""
        right = self.tokenizer.padding_side == "right"
        end_B = torch.full((len(ids_BL),), ids_BL.shape[1], device=ids_BL.device)
        if right:
            end_B = (mask_BL.sum(1) + 1).div(2, rounding_mode="floor").mul(2).clamp(max=ids_BL.shape[1])
        read_B = self._read(ids_BL)
        t_BE: torch.Tensor | None = None
        try:
            for end in end_B.unique().tolist():
                which = (end_B == end).nonzero().flatten()
                mask = None if right else mask_BL[which]
                self._last.read_B = read_B[which] if right else None
                made = self.model(input_ids=ids_BL[which, :end], attention_mask=mask).text_embeds
                t_BE = made.new_empty((len(ids_BL), made.shape[1])) if t_BE is None else t_BE
                t_BE[which] = made
        finally:
            self._last.read_B = None
        assert t_BE is not None
        return t_BE

    def _read(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Places (B,) of the tokens whose states become the embeddings: the first end of text; that
        of older models, whose configuration says 2, is the largest id."""
        end: int = self.model.text_model.eos_token_id
        return ids_BL.argmax(-1) if end == 2 else ids_BL.eq(end).int().argmax(-1)


class ImageEncoder:
    """Pictures to image embeddings; `model` is what OVI enters behind the patch embedding.

    Args:
        path: Folder or hub id of a prior pipeline or of a CLIP-family model.
        room: Pictures at once.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_pickle: bool | None = None,
        room: Room | None = None,
    ) -> None:
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, SiglipVisionModel

        place = locate(path, "image", revision)
        self._siglip = "siglip" in _config(place).model_type
        loader = SiglipVisionModel if self._siglip else CLIPVisionModelWithProjection
        model = load_weights(loader, place, allow_pickle, dtype=dtype, config=_tower_config(place, "image"))
        self.model: Any = frugal(model).to(device).eval().requires_grad_(False)
        # Pillow's arithmetic, whether or not torchvision is installed: embeddings must not depend on that.
        self.processor = _load(AutoImageProcessor, place, place.processor, backend="pil")
        self.device, self.dtype, self.room = device, dtype, room or Room()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image], batch: int = 64) -> torch.Tensor:
        """z_BE, float32 on the CPU."""

        def embedded(part: slice) -> torch.Tensor:
            pixels_BCHW = self.processor(list(pictures[part]), return_tensors="pt").pixel_values
            return self.embed(pixels_BCHW.to(self.device))

        return torch.cat([*self.room.parts(len(pictures), embedded, batch)]).float().cpu().clone()

    def embed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """z_BE of prepared pixel values, in the model's type and on its device."""
        seen = self.model(pixel_values=pixels_BCHW.to(self.dtype))
        return seen.pooler_output if self._siglip else seen.image_embeds

    @torch.inference_mode()
    def zero_states(self) -> torch.Tensor:
        """Hidden states (T, D) that enter the last layer, of the same pixel values: what diffusers contrasts the states
        of a picture with."""
        size = self.model.config.image_size
        pixels = torch.zeros(1, 3, size, size, device=self.device, dtype=self.dtype)
        seen = self.model(pixel_values=pixels, output_hidden_states=True)
        return seen.hidden_states[-2][0].float().cpu().clone()

    @torch.inference_mode()
    def zero_embedding(self) -> torch.Tensor:
        """Embedding (E,) of pixel values that are all zero once normalised (mean grey): Kandinsky 2.2's negative
        condition, `get_zero_embed` in diffusers."""
        size = self.model.config.image_size
        pixels = torch.zeros(1, 3, size, size, device=self.device)
        return self.embed(pixels)[0].float().cpu().clone()
