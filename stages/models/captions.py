"""Where a row's prompt is, and what a text encoder makes of it before it reads it: how many tokens, how many cut off.

Weights in prompts, ``(word:1.3)``, are not understood by any encoder here: brackets, colon and number are read as text,
as diffusers' pipelines read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.contract import Column, Form, Row

PROMPT_COLUMNS = ("prompt", "text", "caption")
"""Where the prompt is looked for, in this order."""
PROMPT_READS: dict[str, Form] = dict.fromkeys(PROMPT_COLUMNS, "text?")


def prompt_of(row: Row) -> str | None:
    """The row's prompt: the first of `PROMPT_COLUMNS` that holds a text."""
    for name in PROMPT_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            return value
    return None


class Reader(NamedTuple):
    """A tokenizer of transformers, or what counts as one does; the tokens that its encoder takes; the encoder's name in
    the pipeline."""

    tokenizer: Any
    limit: int
    name: str = ""


TOKEN_COLUMNS = (
    Column("prompt_tokens", "int64", doc="tokens of the prompt, with those of its start and end"),
    Column("prompt_truncated", "bool", doc="the text encoder takes fewer: the end of the prompt had no part in this"),
)


CUT_COLUMN = Column("prompt_cut", "string", doc="what each text encoder left out of a long prompt; null where nothing")


def cuts(prompts: Sequence[str], readers: Sequence[Reader]) -> list[dict[str, str | None]]:
    """`CUT_COLUMN` of each prompt: for each encoder that left tokens out, how many."""
    found: list[dict[str, str | None]] = []
    for prompt in prompts:
        counts = [(reader, len(reader.tokenizer(prompt, verbose=False)["input_ids"])) for reader in readers]
        said = [
            f"{reader.name or 'text_encoder'} reads {reader.limit} of {count} tokens"
            for reader, count in counts
            if count > reader.limit
        ]
        found.append({"prompt_cut": "; ".join(said) or None})
    return found


def token_counts(prompts: Sequence[str], readers: Sequence[Reader | tuple[Any, int]]) -> list[dict[str, int | bool]]:
    """`TOKEN_COLUMNS` of each prompt.

    Args:
        readers: Of each text encoder.
    """
    found = []
    for prompt in prompts:
        counts = [(len(tokenizer(prompt, verbose=False)["input_ids"]), limit) for tokenizer, limit, *_ in readers]
        found.append(count_told(counts))
    return found


def count_told(counts: Sequence[tuple[int, int]]) -> dict[str, int | bool]:
    """`TOKEN_COLUMNS` of a prompt, of how many tokens each encoder finds and how many it takes."""
    return {
        "prompt_tokens": max(count for count, _ in counts),
        "prompt_truncated": any(count > limit for count, limit in counts),
    }
