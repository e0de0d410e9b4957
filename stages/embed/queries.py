"""Texts such as people search pictures with: an index is tuned on their embeddings beside the pictures' own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stages.engine.device import chosen_device
from stages.models.clip import TextEncoder

COUNT = 500
SEED = 20_240_117
WORD = re.compile(r"(?:([a-z]{3,})</w>|\u2581([a-z]{3,}))")
"""A token that is a whole word: CLIP's tokenizers end it, SigLIP's begin it."""


def query_embeddings(
    path: str, revision: str | None, captions: Sequence[str], allow_pickle: bool | None = None
) -> np.ndarray | None:
    """Embeddings (B, E) of captions, or, where there are none, of ``a photo of a WORD`` with words of the encoder's
    vocabulary; None where that has no words.

    Args:
        path, revision, allow_pickle: Of the text encoder.
        captions: Of pictures of the reference.
    """
    encoder = TextEncoder(path, revision, chosen_device(None), allow_pickle=allow_pickle)
    texts = list(captions) or vocabulary_prompts(encoder.tokenizer)
    return encoder(texts).numpy() if texts else None


def vocabulary_prompts(tokenizer: Any) -> list[str]:
    """Prompts from random words of a tokenizer, the same ones each time."""
    matches = (WORD.fullmatch(token) for token in tokenizer.get_vocab())
    words = sorted({match.group(1) or match.group(2) for match in matches if match})
    chosen = np.random.default_rng(SEED).permutation(len(words))[:COUNT]
    return [f"a photo of a {words[i]}" for i in chosen]


def sample_rows(parts: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """Random rows (B, E) of so many that come in pieces (N, E), the same ones each time."""
    chosen_B, start = np.sort(np.random.default_rng(SEED).permutation(rows)[:COUNT]), 0
    found = []
    for part_NE in parts:
        found.append(part_NE[chosen_B[(chosen_B >= start) & (chosen_B < start + len(part_NE))] - start])
        start += len(part_NE)
    return np.concatenate(found)


def sample_captions(columns: Iterable[Sequence[Any]], rows: int) -> list[str]:
    """Texts of random rows, the same ones each time.

    Args:
        columns: The captions of all rows, in pieces.
        rows: How many there are.
    """
    chosen_B = np.sort(np.random.default_rng(SEED).permutation(rows)[:COUNT])
    found, start = [], 0
    for column in columns:
        mine_B = chosen_B[(chosen_B >= start) & (chosen_B < start + len(column))] - start
        found += [column[int(i)] for i in mine_B]
        start += len(column)
    return [text for text in found if isinstance(text, str) and text.strip()]
