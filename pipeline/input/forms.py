"""In which form a stage takes a value: text, a picture; and what counts as either."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.input.rows import Encoded

PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
"""First bytes of JPEG, PNG, GIF, WebP, BMP, TIFF and JPEG 2000; AVIF has its mark in the fifth."""
_DATA = re.compile(r"data:image/[\w.+-]+;base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
SHORTEST_BASE64 = 64
"""Characters. A picture has more; a path that happens to be made of such letters alone is hardly as long."""
LONGEST_REASON = 500


class FormError(ValueError):
    """The value is not what its column is taken for; the message is what the failed row says."""


def missing(value: Any) -> bool:
    """Null, or not-a-number, which is how pandas writes a missing cell."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def as_text(value: Any) -> str | None:
    """A value as text: UTF-8 bytes count (Spark and TensorFlow write text so), nothing else is turned into any.

    The Python form of a list or a number is never taken for what its author wrote.

    Raises:
        FormError: It is no text.
    """
    if isinstance(value, str) or missing(value):
        return None if missing(value) else str(value)
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise FormError(f"holds {len(value)} bytes that are no UTF-8 text") from None
    raise FormError(f"holds {_kind(value)}, not text; map a column of text, or write the one text that is meant")


def as_picture(value: Any) -> Encoded:
    """A picture in any of the forms that inputs have it in: encoded bytes, a path, base64, a struct of bytes and path.

    Raises:
        FormError: It is none of these.
    """
    if isinstance(value, Encoded):
        return value
    if missing(value):
        return Encoded()
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        return Encoded(value.get("bytes"), value.get("path"))
    if isinstance(value, str):
        data = _decoded(value)
        return Encoded(None, value) if data is None else Encoded(data)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Encoded(bytes(value))
    raise FormError(f"holds {_kind(value)}, no picture")


def _decoded(text: str) -> bytes | None:
    """The bytes of a picture that is written as base64, with or without ``data:image/...;base64,`` before it."""
    told = _DATA.match(text)
    body = text[told.end() :] if told else text
    if not told and (len(body) < SHORTEST_BASE64 or not _BASE64.fullmatch(body)):
        return None
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error:
        if told:
            raise FormError("holds base64 that is damaged") from None
        return None
    return data if told or data.startswith(PICTURE_STARTS) or data[4:8] == b"ftyp" else None


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return f"a list of {len(value)}" if np.ndim(value) or isinstance(value, (list, tuple)) else "an array"
    if isinstance(value, Encoded):
        return "a picture"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(str, value))}"[:200]
    if isinstance(value, (bool, int, float, np.number)):
        return f"the {'truth value' if isinstance(value, bool) else 'number'} {value}"
    return f"a {type(value).__name__}"


def short(reason: str) -> str:
    """A reason for a failed row, without what is too long to be read (a whole picture in base64, say)."""
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
