"""Captions of pictures, to text embeddings: from the rows themselves, or from a second file.

Legend: B rows of a batch, T width of the text embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.contract import Column, Form, Row
from stages.embed.settings import CaptionSettings, StoredEmbeddings
from stages.engine.room import Room
from stages.models import clip
from stages.models.captions import PROMPT_READS, TOKEN_COLUMNS, count_told, prompt_of
from stages.models.copies import here

BATCH = 32  # of one shape always, so that an embedding does not depend on how rows were split
SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json"}


class CaptionError(ValueError):
    """A file of captions cannot be used; the message names it and says what to do."""


class Captioner:
    """Gives rows the embedding of their caption.

    Args:
        settings: Where captions are, and their encoder.
        stored: How embeddings are stored.
        room: Captions at once.
    """

    def __init__(self, settings: CaptionSettings, stored: StoredEmbeddings, device: str, room: Room) -> None:
        self.dtype = stored.store
        self.encoder = clip.TextEncoder(
            settings.encoder, settings.revision, device, allow_pickle=stored.allow_pickle, room=room
        )
        self.width = clip.text_width(settings.encoder, settings.revision)
        self.given = None if settings.path is None else read_captions(settings.path, settings.id, settings.prompt)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows, those with a caption with ``text_embedding`` and `TOKEN_COLUMNS`.

        An embedding that does not fit the dtype it is stored in is left out.
        """
        texts = [self._caption(row) for row in rows]
        held = [i for i, text in enumerate(texts) if text is not None]
        captions = [str(texts[i]) for i in held]
        out = [
            {**row, **({} if self.given is None else {"prompt": text})} for row, text in zip(rows, texts, strict=True)
        ]
        t_BT, counts = self._embed(captions)
        for i, t_T, count in zip(held, t_BT, counts, strict=True):
            told = count_told([(count, self.encoder.length)])
            out[i] |= {**told, "text_embedding": t_T if np.isfinite(t_T).all() else None}
        return out

    def _caption(self, row: Row) -> str | None:
        text = prompt_of(row) if self.given is None else self.given.get(str(row["id"]))
        return text if text and text.strip() else None

    def _embed(self, captions: list[str]) -> tuple[np.ndarray, list[int]]:
        """t_BT as it is stored, and how many tokens each caption has."""
        filled = captions + [""] * (-len(captions) % BATCH)
        if not filled:
            return np.empty((0, self.width), self.dtype), []
        t_BT, counts = self.encoder.counted(filled, batch=BATCH)
        with np.errstate(over="ignore"):
            return t_BT.numpy()[: len(captions)].astype(self.dtype), counts[: len(captions)]


def columns(settings: CaptionSettings, stored: StoredEmbeddings) -> tuple[Column, ...]:
    """What captioned rows have beside their image embedding."""
    width = clip.text_width(settings.encoder, settings.revision)
    told = "raw projected embedding of the caption, norm kept; null where there is none"
    given = () if settings.path is None else (Column("prompt", "string", doc="the caption"),)
    return (*given, *TOKEN_COLUMNS, Column("text_embedding", "tensor", (width,), stored.store, doc=told))


def models(settings: CaptionSettings, stored: StoredEmbeddings) -> dict[str, Mapping[str, str]]:
    """The text encoder, and the file of captions, as `StageInfo.models` describes them."""
    pickles = stored.allow_pickle
    found: dict[str, Mapping[str, str]] = {
        "text_encoder": clip.identity(settings.encoder, "text", settings.revision, allow_pickle=pickles)
    }
    if settings.path is not None:
        found["captions"] = {"path": settings.path, "revision": "", "fingerprint": _digest(settings.path)}
    return found


def reads(settings: CaptionSettings) -> dict[str, Form]:
    """What is taken of an input's row."""
    return PROMPT_READS if settings.path is None else {}


def _digest(path: str) -> str:
    try:
        with open(here(path), "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise CaptionError(f"captions: {path} cannot be read: {error.strerror or error}") from None


def read_captions(path: str, id_column: str, prompt_column: str) -> dict[str, str]:
    """Id -> caption, of a Parquet, CSV or JSONL file; rows without a caption are left out.

    Raises:
        CaptionError: It cannot be read, lacks a column, or has two captions for one id.
    """
    import pyarrow as pa
    import pyarrow.csv as pacsv
    import pyarrow.dataset as ds

    form = next((form for suffix, form in SUFFIXES.items() if path.lower().endswith(suffix)), None)
    if form is None:
        raise CaptionError(f"captions: {path} ends in none of {', '.join(SUFFIXES)}")
    try:
        as_texts = pacsv.ConvertOptions(column_types={id_column: pa.string(), prompt_column: pa.string()})
        read = ds.CsvFileFormat(convert_options=as_texts) if form == "csv" else form  # an id of 007 is no number
        data = ds.dataset(here(path), format=read)
        for key, name in (("id", id_column), ("prompt", prompt_column)):
            if name not in data.schema.names:
                there = ", ".join(data.schema.names)
                raise CaptionError(f"captions.{key}: {path} has no column {name!r}; it has {there}")
        table = data.to_table([id_column, prompt_column])
    except (OSError, pa.ArrowInvalid) as error:
        raise CaptionError(f"captions: {path} cannot be read: {str(error).splitlines()[0]}") from None
    found: dict[str, str] = {}
    for own, text in zip(table[id_column].to_pylist(), table[prompt_column].to_pylist(), strict=True):
        if own is None or not _is_text(text):
            continue
        if found.setdefault(str(own), text) != text:
            raise CaptionError(f"captions: {path} has two captions for the id {str(own)!r}; keep one for each picture")
    return found


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
