"""New words for a frozen text encoder: every row of a batch brings its own vectors, the vocabulary is never touched.

A prompt that holds new words is tokenised with an ordinary stand-in word in their places; a hook on the encoder's input
embedding (`get_input_embeddings`, part of the public interface of transformers) then hands the encoder the vectors that
belong there. So a batch can hold the same word with a different meaning in each row, and gradients reach only the new
vectors.

Legend: B prompts, T positions, V new words a row, D width of one encoder's input embedding, E sum of D over encoders,
C width of the condition (the encoder's output), P width of the pooled output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

NEW_WORD = re.compile(r"<([a-z0-9][a-z0-9-]*)>")
"""How a new word stands in a prompt: lowercase, hyphens, angle brackets."""


class UnknownWord(ValueError):
    """A word that the tokenizer does not hold as one token."""


@dataclass(frozen=True)
class Encoder:
    """One text encoder with its tokenizer.

    Attributes:
        tokenizer: A CLIP tokenizer of transformers.
        model: `CLIPTextModel` or `CLIPTextModelWithProjection`, frozen.
        penultimate: Take the last but one hidden state (SDXL) instead of the last one (Stable Diffusion 1 and 2).
    """

    tokenizer: Any
    model: torch.nn.Module
    penultimate: bool = False

    @property
    def width(self) -> int:
        embeddings: Any = self.model.get_input_embeddings  # typed as a tensor by transformers
        return int(embeddings().weight.shape[1])

    @property
    def table(self) -> torch.Tensor:
        """The vocabulary's vectors, (vocabulary, D)."""
        embeddings: Any = self.model.get_input_embeddings
        weight: torch.Tensor = embeddings().weight
        return weight.detach()


def slug(name: str) -> str:
    """A name as it may stand inside angle brackets: lowercase letters, digits, single hyphens.

    Raises:
        ValueError: Nothing is left of it.
    """
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not text:
        raise ValueError(f"the name {name!r} has no letter or digit: give the concept a name such as 'frozen-in-ice'")
    return text


def word_id(encoder: Encoder, word: str) -> int:
    """The id of a word that is one token.

    Raises:
        UnknownWord: The tokenizer splits the word, or does not know it.
    """
    ids = encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
    special = {encoder.tokenizer.unk_token_id, encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id}
    if len(ids) != 1 or ids[0] in special:
        raise UnknownWord(
            f"{word!r} is {len(ids) or 'no'} tokens of the model's vocabulary, not one: choose a simpler word"
        )
    return int(ids[0])


def word_vectors(encoders: Sequence[Encoder], word: str) -> torch.Tensor:
    """The word's vectors in all encoders, concatenated, (E,) float32.

    Raises:
        UnknownWord: The word is not one token in each of them.
    """
    return torch.cat([e.table[word_id(e, word)].float() for e in encoders])


def phrase_vectors(encoders: Sequence[Encoder], phrase: str) -> torch.Tensor:
    """The mean over the tokens of a phrase of their vectors, (E,) float32: where a subject's token starts.

    Raises:
        UnknownWord: The phrase has no token.
    """
    parts = []
    for encoder in encoders:
        ids = encoder.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        ids = [i for i in ids if i not in (encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id)]
        if not ids:
            raise UnknownWord(f"{phrase!r} holds no word of the model's vocabulary")
        parts.append(encoder.table[torch.tensor(ids, device=encoder.table.device)].float().mean(0))
    return torch.cat(parts)


def tokenize(encoder: Encoder, prompt: str, new_words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt with new words -> ids_T and which_T, padded to the encoder's length.

    The text between new words is tokenised as it would be with the new words added to the tokenizer.

    Args:
        encoder: Its tokenizer splits the ordinary text.
        prompt: Ordinary text and new words, each in angle brackets.
        new_words: The new words, brackets included; their order numbers them.

    Returns:
        ids_T: Vocabulary ids, a stand-in (never a special token) at new words.
        which_T: The new word's number, -1 elsewhere.

    Raises:
        ValueError: The prompt is longer than the encoder's positions, or names a word that is not in `new_words`.
    """
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    stand_in = next(i for i in range(len(tokenizer)) if i not in special)
    ids, which = [tokenizer.bos_token_id], [-1]
    at = 0
    for match in [*NEW_WORD.finditer(prompt), None]:
        piece = prompt[at : match.start() if match else len(prompt)]
        piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece.strip() else []
        ids += piece_ids
        which += [-1] * len(piece_ids)
        if match:
            if match.group() not in new_words:
                raise ValueError(
                    f"the prompt {prompt!r} names {match.group()}, which is none of {', '.join(new_words)}"
                )
            ids.append(stand_in)
            which.append(list(new_words).index(match.group()))
            at = match.end()
    ids.append(tokenizer.eos_token_id)
    which.append(-1)
    length = tokenizer.model_max_length
    if len(ids) > length:
        raise ValueError(f"the prompt {prompt[:80]!r} has {len(ids)} tokens, the model reads {length}: shorten it")
    pad = length - len(ids)
    return torch.tensor(ids + [tokenizer.pad_token_id] * pad), torch.tensor(which + [-1] * pad)


def encode(
    encoders: Sequence[Encoder],
    ids_EBT: Sequence[torch.Tensor],
    which_EBT: Sequence[torch.Tensor],
    new_BVE: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode prompts whose new words have vectors of their own in each row.

    Args:
        encoders: One, or SDXL's two.
        ids_EBT: From `tokenize`, one tensor (B, T) an encoder.
        which_EBT: Likewise.
        new_BVE: The rows' own vectors, the encoders' widths one after the other; differentiable.

    Returns:
        The condition (B, T, C), and the last encoder's projected pooled output (B, P), or None where it has none.
    """
    states, pooled = [], None
    parts = new_BVE.split([e.width for e in encoders], dim=-1)
    for encoder, ids_BT, which_BT, new_BVD in zip(encoders, ids_EBT, which_EBT, parts, strict=True):
        vocabulary_BTD = encoder.table[ids_BT]
        rows_B1 = torch.arange(len(ids_BT), device=ids_BT.device)[:, None]
        own_BTD = new_BVD.to(vocabulary_BTD.dtype)[rows_B1, which_BT.clamp(min=0)]
        embeds_BTD = torch.where((which_BT >= 0)[..., None], own_BTD, vocabulary_BTD)
        output = _run(encoder, ids_BT, embeds_BTD)
        states.append(output.hidden_states[-2] if encoder.penultimate else output.last_hidden_state)
        pooled = getattr(output, "text_embeds", None)
    return torch.cat(states, dim=-1), pooled


def _run(encoder: Encoder, ids_BT: torch.Tensor, embeds_BTD: torch.Tensor) -> Any:
    """The encoder's output with its input embeddings replaced for this one call (ids still place the pooled token)."""
    embeddings: Any = encoder.model.get_input_embeddings
    handle = embeddings().register_forward_hook(lambda module, args, output: embeds_BTD)
    try:
        return encoder.model(ids_BT, output_hidden_states=encoder.penultimate)
    finally:
        handle.remove()
