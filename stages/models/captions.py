"""What a text encoder makes of a prompt before it reads it: how many tokens it has, and whether some are cut off.

Weights in prompts, ``(word:1.3)``, are not understood by any encoder here: brackets, colon and number are read as text,
as diffusers' pipelines read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.contract import Column


class Reader(NamedTuple):
    """A tokenizer of transformers, and the tokens that its encoder takes."""

    tokenizer: Any
    limit: int


TOKEN_COLUMNS = (
    Column("prompt_tokens", "int64", doc="tokens of the prompt, with those of its start and end"),
    Column("prompt_truncated", "bool", doc="the text encoder takes fewer: the end of the prompt had no part in this"),
)


def token_counts(prompts: Sequence[str], readers: Sequence[Reader | tuple[Any, int]]) -> list[dict[str, int | bool]]:
    """`TOKEN_COLUMNS` of each prompt.

    Args:
        readers: Of each text encoder.
    """
    found = []
    for prompt in prompts:
        counts = [(len(tokenizer(prompt, verbose=False)["input_ids"]), limit) for tokenizer, limit in readers]
        found.append({
            "prompt_tokens": max(count for count, _ in counts),
            "prompt_truncated": any(count > limit for count, limit in counts),
        })  # fmt: skip
    return found
