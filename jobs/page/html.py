"""Building blocks of the report page. Every string is escaped here unless it is `Html` already.

Rows are untrusted: prompts hold markup, control characters and other scripts. Nothing from a row reaches the page but
through `escape`, and the page's own policy forbids scripts and foreign addresses on top of it.
"""

from __future__ import annotations

import base64
import html
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_VOID = frozenset({"img", "br", "hr", "meta"})
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


Content = Any
"""What a tag may hold: `Html`, text or numbers (escaped), None (nothing), or an iterable of these."""


def escape(content: Content) -> Html:
    """Markup for any content. Control characters and direction overrides become visible marks."""
    if content is None:
        return Html()
    if isinstance(content, Html):
        return content
    if isinstance(content, Iterable) and not isinstance(content, (str, bytes)):
        return Html("".join(escape(part) for part in content))
    return Html(html.escape("".join(_visible(c) for c in str(content)), quote=True))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs"):
        return chr(0x2400 + ord(character)) if ord(character) < 32 else "\ufffd"
    return character


def tag(name: str, /, *content: Content, **attributes: Any) -> Html:
    """An element. ``class_`` and ``for_`` lose the underscore, other underscores become hyphens, None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{escape(content)}</{name}>")


def shorten(text: Any, limit: int = 240) -> str:
    """At most `limit` characters, saying how many there were."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text):,} characters)"


def words(text: Any, limit: int = 240) -> Html:
    """A row's own text: shortened, and kept from changing the direction of what stands around it."""
    text = str(text)
    return tag("bdi", shorten(text, limit), title=shorten(text, 1000) if len(text) > limit else None)


def table(header: Sequence[Content], rows: Iterable[Sequence[Content]], numeric: Iterable[int] = ()) -> Html:
    """A table; columns whose index is in `numeric` are set right-aligned in tabular figures.

    On a narrow screen one of more than three columns becomes a card a row, in which each cell has its column's name.
    """
    right = set(numeric)
    folds = len(header) > 3 and any(header)
    names = [str(name) if folds and not isinstance(name, Html) else None for name in header]

    def cells(name: str, values: Sequence[Content]) -> Html:
        return escape(
            tag(name, value, class_="n" if n in right else None, data_name=names[n] if name == "td" and n else None)
            for n, value in enumerate(values)
        )

    body = [tag("tr", cells("td", row)) for row in rows]
    head = tag("thead", tag("tr", cells("th", header))) if any(header) else None
    return tag("div", tag("table", head, tag("tbody", body), class_="folds" if folds else None), class_="scroll")


def measures(labels: Sequence[Content], columns: Mapping[str, Sequence[float | None]]) -> Html:
    """A table of measures by method or the like. Whichever are more, methods or measures, are its lines.

    Args:
        labels: What was measured.
        columns: Measure -> its figure for each label; None where there is none.
    """
    from jobs.page.amounts import figures

    written = {name: figures(values, name) for name, values in columns.items()}
    if len(written) > len(labels):
        lines = [[name.replace("_", " "), *cells] for name, cells in written.items()]
        return table(["", *labels], lines, range(1, len(labels) + 1))
    header = ["", *(name.replace("_", " ") for name in written)]
    return table(header, [[label, *row] for label, *row in zip(labels, *written.values(), strict=True)],
                 range(1, len(header)))  # fmt: skip


def picture(image: Image | bytes | None, size: int = 192, alt: str = "") -> Html:
    """A picture as a data URI, scaled down to at most `size` pixels; a mark where there is none or it is broken.

    Args:
        image: A PIL image, encoded bytes, or None.
        size: Longest side in the page's file; small pictures keep their pixels.
    """
    from PIL import Image as pil

    try:
        if image is None:
            raise ValueError("no picture")
        opened = pil.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        small = opened.convert("RGB")
        small.thumbnail((size, size), pil.Resampling.LANCZOS)
    except Exception:  # the bytes are untrusted, and a decoder may raise anything
        return tag("div", "no picture", class_="nopic")
    buffer = io.BytesIO()
    if max(small.size) <= 96:
        small.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        small.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    pixelated = "pixel" if max(small.size) <= 96 else None
    return tag("img", src=f"data:image/{kind};base64,{data}", alt=shorten(alt, 120), class_=pixelated, loading="lazy")


@dataclass(frozen=True)
class Exhibit:
    """A picture of a gallery with the words beneath it."""

    image: Image | bytes | None
    caption: str = ""
    note: str = ""


def gallery(exhibits: Iterable[Exhibit], size: int = 192) -> Html:
    """Pictures in a grid that fits any window."""
    figures = [
        tag(
            "figure",
            picture(exhibit.image, size, exhibit.caption),
            tag(
                "figcaption",
                words(exhibit.caption, 140) if exhibit.caption else None,
                tag("small", exhibit.note) if exhibit.note else None,
            ),
        )
        for exhibit in exhibits
    ]
    return tag("div", figures, class_="gallery")
