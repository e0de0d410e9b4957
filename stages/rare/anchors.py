"""Anchors that nobody named: the nearest caption of a captioned reference that is frequent there and keeps the rest of
a concept's prompt (ours).

Legend: A candidate captions, T width of the text embeddings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from index.reference import find
from pipeline.access import filesystem as filesystem_of
from stages.models.clip import TextEncoder
from stages.rare.settings import Anchors

COLUMNS = ("prompt", "caption", "text")
"""Where a reference's output holds its captions, the first that is there."""
ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class Anchor:
    """A caption that stands for a prompt.

    Attributes:
        count: Rows of the reference that have it.
        distance: 1 - cosine of its text embedding to the prompt's.
    """

    text: str
    count: int
    distance: float


class AnchorFinder:
    """Captions of a reference, by their words and by the reference's own text encoder.

    Raises:
        ValueError: The reference has no captions, or its output does not hold their texts.
    """

    def __init__(self, settings: Anchors, device: str) -> None:
        self._settings, self._device = settings, device
        check(settings)

    @cached_property
    def _counts(self) -> dict[str, int]:
        """The frequent captions and how often each stands there; spelling in capitals or small letters is one."""
        counts = Counter(" ".join(text.lower().split()) for text in _texts(self._settings.reference))
        return {text: count for text, count in counts.items() if count >= self._settings.min_rows}

    @cached_property
    def _encoder(self) -> TextEncoder:
        facts = json.loads((find(self._settings.reference) / "reference.json").read_text())["text_encoder"]
        return TextEncoder(facts["path"], facts.get("revision") or None, self._device)

    @lru_cache  # noqa: B019 (lives as long as its stage)
    def find(self, prompt: str) -> Anchor | None:
        """The nearest frequent caption that differs from a prompt in one word, or lacks one; None: there is none."""
        near = sorted(text for text in self._counts if keeps_the_rest(prompt, text))
        if not near:
            return None
        t_AT = self._encoder([prompt, *near]).double().numpy()
        t_AT /= np.linalg.norm(t_AT, axis=1, keepdims=True)
        cos_A = t_AT[1:] @ t_AT[0]
        best = int(np.argmax(cos_A))
        return Anchor(near[best], self._counts[near[best]], float(1 - cos_A[best]))


def keeps_the_rest(prompt: str, caption: str) -> bool:
    """Whether a caption is the prompt with one word replaced or left out; articles and capitals count for nothing."""
    asked, found = _words(prompt), _words(caption)
    if found == asked or len(found) not in (len(asked), len(asked) - 1):
        return False
    same = next((n for n, (a, b) in enumerate(zip(asked, found, strict=False)) if a != b), len(found))
    return asked[same + 1 :] == found[same + len(found) - len(asked) + 1 :] and len(asked) > 1


def check(settings: Anchors) -> None:
    """Refuse a reference that anchors cannot be found in.

    Raises:
        ValueError: See there.
    """
    path = settings.reference
    facts = json.loads((find(path) / "reference.json").read_text())
    if not (facts.get("captions") or {}).get("captioned"):
        raise ValueError(
            f"anchors: the reference {path} has no captions: make one with `captions: true`, or name each row's anchor"
        )
    if _column(path) is None:
        raise ValueError(
            f"anchors: the output {path} holds none of the columns {', '.join(COLUMNS)}, so what its captions say is "
            "not known: make the reference with `keep: [caption]`, or name each row's anchor"
        )


def identity(settings: Anchors) -> Mapping[str, str]:
    """Which reference it is; part of the fingerprint of what is made with it."""
    told = (find(settings.reference) / "reference.json").read_bytes()
    return {
        "path": settings.reference, "revision": "",
        "fingerprint": hashlib.blake2b(told, digest_size=16).hexdigest(),
    }  # fmt: skip


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[\w'<>-]+", text.lower()) if word not in ARTICLES]


def _dataset(path: str) -> Any:
    import pyarrow.dataset as ds

    filesystem, root = filesystem_of(path)
    try:
        return ds.dataset(f"{root.rstrip('/')}/data", format="parquet", filesystem=filesystem)
    except FileNotFoundError:
        raise ValueError(f"anchors: {path} has no folder data; name the output of the run as a whole") from None


def _column(path: str) -> str | None:
    names = _dataset(path).schema.names
    return next((name for name in COLUMNS if name in names), None)


def _texts(path: str) -> Iterator[str]:
    column = _column(path)
    for batch in _dataset(path).to_batches([column]):
        yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str) and text.strip())
