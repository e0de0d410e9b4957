"""The flow models' small T5: the encoder that FLUX.1 and Stable Diffusion 3 read captions with, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from micro import tokenizer

WIDTH = 256
"""Twice CLIP's: Stable Diffusion 3 puts both CLIPs' features, side by side, into T5's width."""
LENGTH = tokenizer.LENGTH
"""Tokens a prompt that it was trained on; the pipelines' ``max_sequence_length``."""


def learn(captions: Iterable[str], folder: Path) -> T5Tokenizer:
    """A unigram vocabulary of the captions' words and, for everything else, characters; written to ``folder``."""
    counts = Counter(word for text in captions for word in text.replace(",", " ").split())
    for word in tokenizer.MORE_WORDS.split():
        counts[word] += 10
    total = sum(counts.values())
    characters = {chr(c) for c in range(33, 127)} | {c for word in counts for c in word}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [
        (f"▁{word}", float(np.log(n / total))) for word, n in sorted(counts.items(), key=lambda p: (-p[1], p[0]))
    ]
    pieces += [("▁", -20.0), *((c, -20.0) for c in sorted(characters))]
    words = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
    words.save_pretrained(folder)
    return words


def build(words: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=32, num_heads=4, d_ff=WIDTH, num_layers=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, relative_attention_max_distance=32,
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    ))  # fmt: skip


def tokenize_all(words: T5Tokenizer, captions: np.ndarray) -> np.ndarray:
    """Captions of any shape -> token ids of that shape + (LENGTH,), int64."""
    texts = captions.reshape(-1).tolist()
    ids = words(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np").input_ids
    return ids.reshape(*captions.shape, LENGTH).astype(np.int64)
