"""The miniature models' tokenizer: a real `CLIPTokenizer` whose merges were learned on the world's captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

LENGTH = 32
"""Tokens a prompt, with start and end: the longest caption of the world has 30."""

# Words a concept or an instruction may need beyond the captions' own, so that each is one token.
MORE_WORDS = (
    "the this that these those is are was in on at with and or not no of for from to by as it its very some many few "
    "four five six object thing shape colour color texture pattern style frozen ice melted broken shiny fuzzy wooden "
    "metal glass big tiny huge little round pointy dark bright light empty full open closed top bottom middle corner "
    "centre center near far between inside outside next beside behind"
)


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's reversible map from bytes to printable characters, which CLIP's BPE uses too."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    extra = 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return table


def learn(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn merges until every frequent word is one token; write ``vocab.json`` and ``merges.txt`` and load them."""
    counts = Counter(word for text in captions for word in text.lower().replace(",", " , ").split())
    for word in MORE_WORDS.split():
        counts[word] += 10
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    alphabet = list(_bytes_to_unicode().values())
    vocab = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(vocab))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
