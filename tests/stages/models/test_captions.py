"""Prompts that an encoder cuts are told."""

from __future__ import annotations

import pytest

from stages.models.captions import token_counts
from tests.support.tiny_stable_diffusion import tokenizer


@pytest.mark.parametrize(("words", "tokens", "cut"), [(0, 2, False), (1, 3, False), (6, 8, False), (7, 9, True)])
def test_tokens_are_counted_with_start_and_end(words: int, tokens: int, cut: bool) -> None:
    (found,) = token_counts([" ".join(["red"] * words)], [(tokenizer(8), 8)])
    assert found == {"prompt_tokens": tokens, "prompt_truncated": cut}


def test_the_encoder_that_takes_least_decides() -> None:
    prompts = ["red " * 7, "red"]
    found = token_counts(prompts, [(tokenizer(16), 16), (tokenizer(8), 8)])
    assert [row["prompt_truncated"] for row in found] == [True, False]


def test_weights_are_text() -> None:
    """As in diffusers: brackets, colon and number are tokens like any other."""
    plain, weighted = token_counts(["a red star", "a (red:1.3) star"], [(tokenizer(), 16)])
    assert weighted["prompt_tokens"] - plain["prompt_tokens"] == len("(:1.3)")
