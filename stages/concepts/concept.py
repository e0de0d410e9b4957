"""What a user says about one concept: its words, its subjects with and without it, words near it and words against it.

A row becomes a `Concept`, or a `ConceptError` that names the concept and the field to mend.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.access import filesystem as filesystem_of
from pipeline.addresses import Refused, names_host, placed, shown
from pipeline.contract import Row
from pipeline.pictures import decode_picture
from pipeline.web import get
from stages.concepts.settings import Templates
from stages.concepts.templates import filled
from stages.models.words import slug

if TYPE_CHECKING:
    from PIL.Image import Image

FUNCTION_WORDS = frozenset({
    "a", "an", "the", "in", "on", "of", "at", "by", "to", "from", "with", "without", "into", "onto", "out", "over",
    "under", "above", "below", "and", "or", "is", "are", "that", "as", "like",
})  # fmt: skip
"""Words of a concept that stay ordinary text unless angle brackets say otherwise."""

MAX_PIXELS = 64_000_000
"""A training picture with more is refused before it is decoded."""
MAX_BYTES = 8 * MAX_PIXELS
"""Nor can such a picture need more than these."""


class ConceptError(ValueError):
    """What is wrong with one concept, in words its author can act on."""


@dataclass(frozen=True)
class Subject:
    """One thing, shown with the concept and without it."""

    name: str
    with_: tuple[Any, ...]
    without: tuple[Any, ...]


@dataclass(frozen=True)
class Concept:
    """One concept to be learned.

    Attributes:
        name: Its slug.
        phrase: The concept as it stands in a prompt, new words in angle brackets.
        words: The user's words that became tokens.
        tokens: Their new words, ``<name-1>``, ``<name-2>``...
        start: The vocabulary words they start from.
        positive, negative: Context words of each token.
        subjects: At least one.
        subject_tokens: Their new words, ``<name-subject-1>``...
        templates: Prompts of this concept.
    """

    name: str
    phrase: str
    words: tuple[str, ...]
    tokens: tuple[str, ...]
    start: tuple[str, ...]
    positive: tuple[tuple[str, ...], ...]
    negative: tuple[tuple[str, ...], ...]
    subjects: tuple[Subject, ...]
    subject_tokens: tuple[str, ...]
    templates: Templates

    def examples(
        self, separation: bool, templates: Sequence[str] | None = None
    ) -> Iterator[tuple[bool, tuple[str, ...], Any]]:
        """(has the concept, prompts, picture) of every training picture.

        Args:
            separation: Lego's subject separation: both sets, the subject as a token of its own. Otherwise the pictures
                with the concept alone, under the plain prompt.
            templates: Texts that the prompt goes into, each a prompt of the picture; None: the prompt as it is.
        """
        for subject, token in zip(self.subjects, self.subject_tokens, strict=True):
            prompt = self.templates.with_ if separation else self.templates.plain
            prompts = filled(prompt.format(subject=token, concept=self.phrase), templates)
            yield from ((True, prompts, picture) for picture in subject.with_)
            if separation:
                prompts = filled(self.templates.without.format(subject=token, concept=self.phrase), templates)
                yield from ((False, prompts, picture) for picture in subject.without)


def read_concept(row: Row, templates: Templates, *, separation: bool = True, context: bool = True) -> Concept:
    """A row of the concept table as a `Concept`.

    Columns: ``name`` (left out: the id), ``concept`` (the words; those in angle brackets, or else all that are no
    function words, become tokens), ``subject`` with ``with`` and ``without`` (lists of pictures), or ``subjects`` (a
    list of objects with ``name``, ``with``, ``without``), ``positive`` and ``negative`` (word -> list of words, or a
    plain list when the concept has one token), ``start`` (word -> word), ``prompt_with``,
    ``prompt_without``, ``prompt_plain``. Values that are no strings may come as JSON text.

    Args:
        row: The row.
        templates: Prompts, where the row has none of its own.
        separation: Pictures without the concept are needed.
        context: Positive and negative words are needed.

    Raises:
        ConceptError: Something is missing or does not fit.
    """
    name = slug(str(row.get("name") or row["id"]))
    text = row.get("concept")
    if not isinstance(text, str) or not text.strip():
        raise ConceptError(
            f"concept {name}: the column 'concept' is empty; write its words, for instance 'frozen in ice'"
        )
    words, phrase = _split_phrase(name, text)
    if not words:
        raise ConceptError(f"concept {name}: {text!r} has no content word; mark the words to learn as in '<left> of'")
    subjects = _subjects(name, row, separation)
    per_word = {key: _words_of(name, key, row.get(key), words) for key in ("positive", "negative")}
    if context:
        for key, lists in per_word.items():
            for word, found in zip(words, lists, strict=True):
                if not found:
                    raise ConceptError(
                        f"concept {name}: no {key} words for {word!r}; give some in '{key}', or set context: none"
                    )
    start = _mapping(name, "start", row.get("start"), words)
    prompts = {
        field: str(row[column])
        for field, column in (("without", "prompt_without"), ("with_", "prompt_with"), ("plain", "prompt_plain"))
        if row.get(column)
    }
    return Concept(
        name=name,
        phrase=phrase,
        words=words,
        tokens=tuple(f"<{name}-{i + 1}>" for i in range(len(words))),
        start=tuple(str(start.get(word, word)) for word in words),
        positive=per_word["positive"],
        negative=per_word["negative"],
        subjects=subjects,
        subject_tokens=tuple(f"<{name}-subject-{i + 1}>" for i in range(len(subjects))),
        templates=_checked(name, Templates(**(templates.model_dump() | prompts))),
    )


def _split_phrase(name: str, text: str) -> tuple[tuple[str, ...], str]:
    """``frozen in ice`` -> (("frozen", "ice"), "<name-1> in <name-2>")."""
    marked = "<" in text
    words: list[str] = []
    parts: list[str] = []
    for part in re.findall(r"<[^<>]*>|[^\s<>]+", text):
        if part.startswith("<") if marked else part.lower() not in FUNCTION_WORDS:
            words.append(part.strip("<>").strip())
            parts.append(f"<{name}-{len(words)}>")
        else:
            parts.append(part)
    return tuple(words), " ".join(parts)


def _subjects(name: str, row: Row, separation: bool) -> tuple[Subject, ...]:
    raw = _json(name, "subjects", row.get("subjects"))
    if raw is None:
        raw = [{"name": row.get("subject"), "with": row.get("with"), "without": row.get("without")}]
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise ConceptError(f"concept {name}: 'subjects' is no list; write [{{name: ..., with: [...], without: [...]}}]")
    subjects = []
    for item in raw:
        if not isinstance(item, Mapping) or not item.get("name"):
            raise ConceptError(
                f"concept {name}: a subject has no name; say what the pictures show, for instance 'robot'"
            )
        sets = {key: picture_list(name, key, item.get(key)) for key in ("with", "without")}
        for key, needed in (("with", True), ("without", separation)):
            if needed and len(sets[key]) < 2:
                raise ConceptError(
                    f"concept {name}, subject {item['name']!r}: {len(sets[key])} pictures {key} the concept, "
                    f"at least 2 are needed; add them under '{key}'"
                )
        subjects.append(Subject(str(item["name"]), sets["with"], sets["without"]))
    return tuple(subjects)


def picture_list(name: str, key: str, value: Any) -> tuple[Any, ...]:
    """The pictures in a column of a concept's row: a list, one alone, or JSON text of either; nothing for null.

    Raises:
        ConceptError: JSON that cannot be read.
    """
    value = _json(name, key, value)
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        value = [value]
    return tuple(value)


def _words_of(name: str, key: str, value: Any, words: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    value = _json(name, key, value)
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if isinstance(value, Sequence):
        if len(words) > 1:
            raise ConceptError(
                f"concept {name}: '{key}' is one list for {len(words)} tokens; "
                f"write a list for each: {{{words[0]}: [...], ...}}"
            )
        value = {words[0]: value}
    found = _mapping(name, key, value, words)
    return tuple(tuple(str(w) for w in (found.get(word) or ())) for word in words)


def _mapping(name: str, key: str, value: Any, words: Sequence[str]) -> dict[str, Any]:
    value = _json(name, key, value)
    if value is None:
        return {}
    if isinstance(value, str) and len(words) == 1:
        return {words[0]: value}
    if not isinstance(value, Mapping):
        raise ConceptError(f"concept {name}: '{key}' is {value!r}; write it as {{{words[0]}: ...}}")
    # A Parquet struct column carries every row's words; those of other concepts are null here.
    given = {str(word): found for word, found in value.items() if found is not None}
    unknown = sorted(set(given) - set(words))
    if unknown:
        raise ConceptError(
            f"concept {name}: '{key}' names {unknown[0]!r}, which is no token of it ({', '.join(words)})"
        )
    return given


def _json(name: str, key: str, value: Any) -> Any:
    """The value; text that looks like JSON is read as such (CSV has no lists)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ConceptError(f"concept {name}: '{key}' is no valid JSON: {error}") from None
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def _checked(name: str, templates: Templates) -> Templates:
    """Raises where a prompt cannot be filled in, or would not hold the concept."""
    for field, needed in (("without", "{subject}"), ("with_", "{concept}"), ("plain", "{concept}")):
        text = getattr(templates, field)
        try:
            text.format(subject="", concept="")
        except (KeyError, IndexError, ValueError):
            raise ConceptError(
                f"concept {name}: the prompt {text!r} may hold {{subject}} and {{concept}} only"
            ) from None
        if needed not in text:
            raise ConceptError(f"concept {name}: the prompt {text!r} lacks {needed}")
    return templates


def open_picture(value: Any, root: str = "", allow: Iterable[str] = ()) -> Image:
    """A training picture as RGB: a PIL image, encoded bytes, ``{bytes, path}``, or an address that fsspec opens.

    It is decoded as a row's picture is: colours in sRGB, white behind what is transparent.

    Args:
        value: The picture.
        root: Folder that relative addresses start from, and that an address may lie in.
        allow: Further folders and beginnings of addresses that it may lie below.

    Raises:
        ConceptError: It cannot be read, or lies elsewhere, with its address.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    label = f"a picture of {len(value)} bytes" if isinstance(value, bytes) else shown(str(value))
    try:
        if isinstance(value, str):
            value = _fetched(value, root.rstrip("/"), tuple(allow))
        return decode_picture(value, MAX_PIXELS)
    except ConceptError:
        raise
    except Refused as error:
        raise ConceptError(str(error)) from None
    except FileNotFoundError:
        raise ConceptError(f"{label} does not exist (looked for it in {shown(root) or 'no folder'})") from None
    except Exception as error:
        raise ConceptError(f"{label} is no readable picture: {error}") from None


def _fetched(address: str, root: str, allow: tuple[str, ...]) -> bytes:
    """The bytes behind an address of a row, which is a stranger's."""
    place = placed(address, root, allow)
    if place.startswith(("http://", "https://")):
        return get(place, {}, MAX_BYTES, partial(names_host, (root, *allow)))
    filesystem, path = filesystem_of(place)
    with filesystem.open(path, "rb") as file:
        data: bytes = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConceptError(f"{shown(address)} has more than {MAX_BYTES:,} bytes: make it smaller")
    return data
