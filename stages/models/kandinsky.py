"""Kandinsky 2.2: its decoder, image embeddings to pictures, batched, every row's noise its own; loading its prior.

Legend: B rows, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.contract import Row, failed
from stages.engine.device import unasked_dtype
from stages.engine.passthrough import in_batches
from stages.engine.randomness import row_generator
from stages.engine.room import Room
from stages.models.copies import here
from stages.models.decoding import Decode
from stages.models.files import read_config
from stages.models.latent import Place
from stages.models.memory import on_meta

PARTS = ("unet", "movq")


class DecoderError(ValueError):
    """The decoder cannot be loaded or used; the message says why."""


def identity(decode: Decode, allow_pickle: bool | None = None) -> dict[str, dict[str, str]]:
    """Role -> path, revision and fingerprint of the decoder's networks, for `StageInfo.models`."""
    return {f"decoder_{part}": place.identity() for part, place in _places(decode, allow_pickle).items()}


def blanks(decode: Decode) -> list[Any]:
    """The decoder's networks on the meta device: shapes and no numbers.

    Raises:
        OSError, ValueError: There are none.
    """
    from diffusers import UNet2DConditionModel, VQModel

    kinds: tuple[Any, ...] = (UNet2DConditionModel, VQModel)
    found = []
    for part, kind in zip(PARTS, kinds, strict=True):
        config = kind.load_config(here(decode.model), subfolder=part, revision=decode.revision)
        found.append(on_meta(kind, config, torch.float16))
    return found


def _places(decode: Decode, allow_pickle: bool | None) -> dict[str, Place]:
    return {part: Place(decode.model, decode.revision, part, allow_pickle=bool(allow_pickle)) for part in PARTS}


def check_width(decode: Decode, width: int) -> None:
    """Refuse a decoder of other embeddings; loads no weights.

    Args:
        width: Of the embeddings that it will be given.

    Raises:
        DecoderError: There is no such pipeline, or it takes embeddings of another width.
    """
    try:
        config = read_config(decode.model, folder="unet", revision=decode.revision)
    except OSError as error:
        raise DecoderError(f"{decode.model}: no Kandinsky 2.2 decoder can be loaded: {error}") from None
    taken = config.get("encoder_hid_dim")
    if taken is not None and taken != width:
        raise DecoderError(f"{decode.model}: takes embeddings of width {taken}, the encoder gives {width}")


class Rounded(nn.Module):
    """A text encoder in use elsewhere, as a prior of another type sees it: what it says is rounded to that type.

    Args:
        encoder: Of transformers; stays as it is.
        dtype: The prior's.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.dtype = encoder, dtype
        self.device: torch.device = next(encoder.parameters()).device

    def forward(self, ids_BL: torch.Tensor) -> SimpleNamespace:
        said = self.encoder(ids_BL)
        names = ("text_embeds", "last_hidden_state")
        return SimpleNamespace(**{name: getattr(said, name).to(self.dtype) for name in names})


def load_prior_pipeline(
    path: str, revision: str | None, dtype: torch.dtype, allow_pickle: bool | None, prior: Any = None,
    text_encoder: nn.Module | None = None,
) -> Any:  # fmt: skip
    """The prior pipeline, on the CPU. Its image encoder, which embeds an empty picture for a decoder, stays out.

    Args:
        prior: A network in place of its own prior.
        text_encoder: Its own, where that is in memory already, of whatever type.

    Raises:
        OSError, ValueError: There is none, or its weights are in no form that is read.
    """
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer
    from transformers import CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"text_encoder": CLIPTextModelWithProjection, "prior": PriorTransformer}
    given = {"prior": prior, "text_encoder": text_encoder}
    networks = {
        part: Place(path, revision, part, allow_pickle=bool(allow_pickle)).load(kind, dtype)
        if given[part] is None else given[part]
        for part, kind in kinds.items()
    }  # fmt: skip
    pipe = KandinskyV22PriorPipeline.from_pretrained(
        here(path), dtype=dtype, revision=revision, image_encoder=None, **networks
    )
    if text_encoder is not None and text_encoder.dtype != dtype:
        pipe.text_encoder = Rounded(text_encoder, dtype)
    pipe.get_zero_embed = lambda *given, **named: None
    return pipe


class Decoder:
    """Kandinsky 2.2's decoder pipeline by folder or hub id.

    The U-Net takes the embedding as it is, with no normalisation; classifier-free guidance contrasts it with the
    embedding of an all-zero input, which is computed once and passed in here.

    Args:
        decode: Folder or hub id of a `KandinskyV22Pipeline`, and how it samples.
        negative_E: The image encoder's output for the all-zero input.
        room: Pictures at once.

    Raises:
        DecoderError: There is no such pipeline, or it takes embeddings of another width.
    """

    def __init__(self, decode: Decode, negative_E: torch.Tensor, *, seed: int = 0, device: str = "cpu",
                 allow_pickle: bool | None = None, room: Room | None = None) -> None:  # fmt: skip
        from diffusers import KandinskyV22Pipeline, UNet2DConditionModel, VQModel

        check_width(decode, len(negative_E))
        path = decode.model
        dtype = unasked_dtype(device)
        try:
            places = _places(decode, allow_pickle)
            networks = {part: places[part].load(kind, dtype)
                        for part, kind in zip(PARTS, (UNet2DConditionModel, VQModel), strict=True)}  # fmt: skip
            pipe = KandinskyV22Pipeline.from_pretrained(here(path), dtype=dtype, revision=decode.revision, **networks)
        except (OSError, ValueError) as error:
            raise DecoderError(f"{path}: no Kandinsky 2.2 decoder can be loaded: {error}") from None
        self.pipe: Any = pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.room = room or Room()
        for part in PARTS:
            getattr(self.pipe, part).requires_grad_(False)
        self.negative_E, self.decode, self.seed, self.device = negative_E, decode, seed, device
        # The latent's side times the factor of the autoencoder that the pipeline calls MoVQ.
        self.size = decode.size or pipe.unet.config.sample_size * pipe.movq_scale_factor

    def pictures(self, z_BE: torch.Tensor, keys: list[str]) -> list[Any]:
        """RGB PIL pictures, size x size; row b's noise is drawn from (seed, keys[b])."""
        done: list[Any] = self.pipe(
            image_embeds=z_BE.to(self.device),
            negative_image_embeds=self.negative_E.to(self.device).expand(len(z_BE), -1),
            height=self.size, width=self.size, num_inference_steps=self.decode.steps,
            guidance_scale=self.decode.guidance,
            generator=[row_generator(self.seed, key, "decode") for key in keys],
        ).images  # fmt: skip
        return done

    def __call__(self, rows: Iterable[Row], key: str = "id") -> Iterator[Row]:
        """Adds `image` to rows with an `embedding`; the noise is drawn from what they hold under `key`."""
        return in_batches(rows, self.decode.batch_size, lambda batch: self._finite(batch, key))

    def _finite(self, rows: list[Row], key: str) -> Iterator[Row]:
        finite = [bool(np.isfinite(row["embedding"]).all()) for row in rows]
        for row, fine in zip(rows, finite, strict=True):
            if not fine:
                yield failed(row, "the embedding is not finite and cannot be decoded")
        yield from self._decoded([row for row, fine in zip(rows, finite, strict=True) if fine], key)

    def _decoded(self, rows: list[Row], key: str) -> Iterator[Row]:
        if not rows:
            return
        z_BE = torch.from_numpy(np.stack([row["embedding"] for row in rows])).float()
        keys = [row[key] for row in rows]
        parts = self.room.parts(len(rows), lambda part: self.pictures(z_BE[part], keys[part]))
        pictures = [picture for part in parts for picture in part]
        yield from ({**row, "image": picture} for row, picture in zip(rows, pictures, strict=True))
