"""From a row of the concept table to tensors: pictures as latents, prompts as token ids, words as vectors.

Legend: I training pictures, V new words, M context words, E width of a word over all encoders, T text positions;
C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.contract import Row
from stages.concepts.concept import Concept, ConceptError, open_picture, read_concept
from stages.concepts.settings import LegoSettings, Templates
from stages.models.latent import LatentModel
from stages.models.pictures import encode_pictures
from stages.models.words import Encoder, UnknownWord, phrase_vectors, tokenize, word_vectors

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 128
"""Pixels of a training picture on the sheet that is kept of them."""


@dataclass(frozen=True)
class Prepared:
    """A concept as tensors.

    Attributes:
        z_ICHW: Latents of the training pictures.
        with_I: Which of them show the concept.
        ids_EIT, which_EIT: Their prompts, one tensor an encoder.
        start_VE: Where the new words start; concept words first, then subjects.
        positive, negative: Vectors (M, E) of each concept word's context.
        thumbnails: The training pictures, small, for the report.
    """

    concept: Concept
    z_ICHW: torch.Tensor
    with_I: torch.Tensor
    ids_EIT: tuple[torch.Tensor, ...]
    which_EIT: tuple[torch.Tensor, ...]
    start_VE: torch.Tensor
    positive: list[torch.Tensor]
    negative: list[torch.Tensor]
    thumbnails: list[Image]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The new words as they stand in a prompt."""
        return self.concept.tokens + self.concept.subject_tokens

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All numbers that what is learned depends on."""
        return (
            self.z_ICHW, self.start_VE, *self.ids_EIT, *self.which_EIT, *self.positive, *self.negative
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
        settings: Say whether pictures without the concept and context words are needed.
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
    examples = list(concept.examples(settings.separation))
    encoders = model.text_encoders
    try:
        start = [word_vectors(encoders, word) for word in concept.start]
        start += [phrase_vectors(encoders, subject.name) for subject in concept.subjects]
        positive, negative = (
            [_stacked(encoders, words) for words in side] for side in (concept.positive, concept.negative)
        )
        prompts = [[tokenize(e, prompt, tokens) for _, prompt, _ in examples] for e in encoders]
    except UnknownWord as error:
        raise ConceptError(
            f"concept {concept.name}: {error} (columns 'start', 'positive', 'negative', 'concept')"
        ) from None
    except ValueError as error:
        raise ConceptError(f"concept {concept.name}: {error}") from None
    pictures = _opened(concept, [picture for _, _, picture in examples], root, allow)
    return Prepared(
        concept=concept,
        z_ICHW=encode_pictures(model, pictures),
        with_I=torch.tensor([shown for shown, _, _ in examples]),
        ids_EIT=tuple(torch.stack([ids for ids, _ in of_one]).to(model.device) for of_one in prompts),
        which_EIT=tuple(torch.stack([which for _, which in of_one]).to(model.device) for of_one in prompts),
        start_VE=torch.stack(start),
        positive=positive,
        negative=negative,
        thumbnails=[_thumbnail(picture, min(model.geometry.width, THUMBNAIL)) for picture in pictures],
    )


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
