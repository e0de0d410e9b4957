"""From a row of the concept table to tensors: pictures as latents, prompts as token ids, words as vectors.

Legend: I training pictures, F forms of each (as it is, and mirrored where pictures are flipped), P prompts of each (one
a template), V new words, M context words, E width of a word over all encoders, T text positions; C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.contract import Row
from stages.concepts.concept import Concept, ConceptError, open_picture, read_concept
from stages.concepts.settings import LegoSettings, Templates
from stages.concepts.templates import texts
from stages.models.latent import LatentModel
from stages.models.pictures import cropped
from stages.models.words import Encoder, UnknownWord, phrase_vectors, tokenize, word_vectors

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 128
"""Pixels of a training picture on the sheet that is kept of them."""


@dataclass(frozen=True)
class Prepared:
    """A concept as tensors.

    Attributes:
        z_IFCHW: Latents of the training pictures.
        std_IFCHW: Standard deviation of the autoencoder's posterior; None where its mean is learned from.
        with_I: Which pictures show the concept.
        ids_EIPT, which_EIPT: Their prompts, one tensor an encoder.
        start_VE: Where the new words start; concept words first, then subjects.
        positive, negative: Vectors (M, E) of each concept word's context.
        thumbnails: The training pictures, small, for the report.
    """

    concept: Concept
    z_IFCHW: torch.Tensor
    std_IFCHW: torch.Tensor | None
    with_I: torch.Tensor
    ids_EIPT: tuple[torch.Tensor, ...]
    which_EIPT: tuple[torch.Tensor, ...]
    start_VE: torch.Tensor
    positive: list[torch.Tensor]
    negative: list[torch.Tensor]
    thumbnails: list[Image]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The new words as they stand in a prompt."""
        return self.concept.tokens + self.concept.subject_tokens

    def as_they_are(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """z_ICHW, ids_EIT and which_EIT: each picture unmirrored, at its posterior's mean, under its first prompt."""
        ids_EIT, which_EIT = ([x_IPT[:, 0] for x_IPT in side] for side in (self.ids_EIPT, self.which_EIPT))
        return self.z_IFCHW[:, 0], ids_EIT, which_EIT

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All numbers that what is learned depends on."""
        spread = () if self.std_IFCHW is None else (self.std_IFCHW,)
        return (
            self.z_IFCHW, self.start_VE, *self.ids_EIPT, *self.which_EIPT, *self.positive, *self.negative, *spread
        )  # fmt: skip


def prepare(
    row: Row,
    model: LatentModel,
    settings: LegoSettings,
    templates: Templates,
    *,
    max_words: int,
    root: str,
    allow: Sequence[str] = (),
) -> Prepared:
    """Read a row of the concept table and encode its pictures.

    Args:
        row: As `stages.concepts.concept.read_concept` takes it.
        model: Frozen.
        settings: Say whether pictures without the concept and context words are needed, and in which forms and under
            which prompts the pictures are learned from.
        templates: Prompts, where the row has none of its own.
        max_words: Most new words a concept may have.
        root: Folder that relative picture addresses start from, and that addresses may lie in.
        allow: Further folders and beginnings of addresses that they may lie below.

    Raises:
        ConceptError: Something about the concept is to be mended.
    """
    concept = read_concept(row, templates, separation=settings.separation, context=settings.context != "none")
    tokens = concept.tokens + concept.subject_tokens
    if len(tokens) > max_words:
        raise ConceptError(
            f"concept {concept.name}: {len(tokens)} new words, the job's max_words is {max_words}: raise it"
        )
    examples = list(concept.examples(settings.separation, texts(settings.templates)))
    encoders = model.text_encoders
    try:
        start = [word_vectors(encoders, word) for word in concept.start]
        start += [phrase_vectors(encoders, subject.name) for subject in concept.subjects]
        positive, negative = (
            [_stacked(encoders, words) for words in side] for side in (concept.positive, concept.negative)
        )
        tokenized = [_tokenized(encoder, [prompts for _, prompts, _ in examples], tokens) for encoder in encoders]
    except UnknownWord as error:
        raise ConceptError(
            f"concept {concept.name}: {error} (columns 'start', 'positive', 'negative', 'concept')"
        ) from None
    except ValueError as error:
        raise ConceptError(f"concept {concept.name}: {error}") from None
    pictures = _opened(concept, [picture for _, _, picture in examples], root, allow)
    z_IFCHW, std_IFCHW = _latents(model, pictures, bool(settings.flip))
    return Prepared(
        concept=concept,
        z_IFCHW=z_IFCHW,
        std_IFCHW=std_IFCHW if settings.posterior == "sample" else None,
        with_I=torch.tensor([shown for shown, _, _ in examples]),
        ids_EIPT=tuple(ids_IPT.to(model.device) for ids_IPT, _ in tokenized),
        which_EIPT=tuple(which_IPT.to(model.device) for _, which_IPT in tokenized),
        start_VE=torch.stack(start),
        positive=positive,
        negative=negative,
        thumbnails=[_thumbnail(picture, min(model.geometry.width, THUMBNAIL)) for picture in pictures],
    )


def _tokenized(
    encoder: Encoder, prompts: Sequence[Sequence[str]], tokens: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_IPT and which_IPT of each picture's prompts; pictures of one set share theirs, which are tokenised once."""
    once = {prompt: tokenize(encoder, prompt, tokens) for of_one in prompts for prompt in of_one}
    ids_IPT, which_IPT = (
        torch.stack([torch.stack([once[prompt][part] for prompt in of_one]) for of_one in prompts]) for part in (0, 1)
    )
    return ids_IPT, which_IPT


@torch.no_grad()
def _latents(model: LatentModel, pictures: Sequence[Image], flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """z_IFCHW and std_IFCHW of the pictures' posteriors, with `flip` of the mirrored pictures too: mirrored before they
    are encoded, since a mirrored latent is none of a mirrored picture.
    """
    x_ICHW = cropped(model, pictures)
    forms = [model.posterior(x_ICHW)]
    if flip:
        forms.append(model.posterior(x_ICHW.flip(-1)))
    z_IFCHW, std_IFCHW = (torch.stack(parts, dim=1) for parts in zip(*forms, strict=True))
    return z_IFCHW, std_IFCHW


def _stacked(encoders: Sequence[Encoder], words: Sequence[str]) -> torch.Tensor:
    """Vectors (M, E) of context words, (0, E) of none."""
    if not words:
        table = encoders[0].table
        return torch.zeros((0, sum(e.width for e in encoders)), device=table.device)
    return torch.stack([word_vectors(encoders, word) for word in words])


def _opened(concept: Concept, values: Sequence[Any], root: str, allow: Sequence[str]) -> list[Image]:
    try:
        return [open_picture(value, root, allow) for value in values]
    except ConceptError as error:
        raise ConceptError(f"concept {concept.name}: {error}") from None


def _thumbnail(picture: Image, side: int) -> Image:
    from PIL import ImageOps

    return ImageOps.fit(picture, (side, side))
