"""A folder tree of concepts as rows: one for each ``concept.yaml``, with the pictures in the folders beside it.

frozen-in-ice/concept.yaml        what a row of a concept table says: concept, subject, positive, negative ...
frozen-in-ice/with/*.png          pictures with the concept
frozen-in-ice/without/*.png       pictures without it
frozen-in-ice/subjects/robot/with/*.png, .../without/*.png     instead, when there are several subjects
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from pipeline.access import connect
from pipeline.addresses import beside
from pipeline.input.files import InputFile
from pipeline.input.rows import Begins, FileScan, Format, Look, Raw, Span, Wanted, picked, untold
from pipeline.input.source import SUFFIXES, Source, SourceError
from pipeline.input.streams import open_input
from pipeline.storage import version_of

LONGEST_TEXT = 1 << 20
"""Bytes of a ``concept.yaml``."""
DEEPEST = 64
Pictures = list[tuple[str, int, str]]
"""Address, size and version of each."""


def _id(name: str) -> str:
    """The id of the row in ``<folder>/concept.yaml``: the folder's path."""
    return name.rpartition("/")[0] or name


def _scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    """One row, whose digest changes with the text and with every picture."""
    digest = hashlib.blake2b(digest_size=16)
    with open_input(file.path, source) as handle:
        digest.update(handle.read(LONGEST_TEXT + 1))
    for kind, pictures in _folders(source, file.path):
        for path, size, version in pictures:
            digest.update(f"{kind}\x1f{path.rpartition('/')[2]}\x1f{size}\x1f{version}\x1e".encode())
    if look is not None:
        for raw in _rows(source, Span(file.name, file.path, 0, 1), None):
            look(0, raw.values)
    return FileScan(1, digest.hexdigest(), keys=(_id(file.name),))


def _rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    """The row: the file's keys, and the addresses of the pictures."""
    import yaml

    name = _id(span.name)
    with open_input(span.path, source) as handle:
        text = handle.read(LONGEST_TEXT + 1)
    try:
        said = _parsed(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        yield Raw(name, {}, f"{span.name} is no readable YAML: {' '.join(str(error).split())}")
        return
    if not isinstance(said, dict):
        yield Raw(name, {}, f"{span.name} holds no keys; write for instance 'concept: frozen in ice'")
        return
    values: dict[str, Any] = {"name": name.rpartition("/")[2], **said}
    subjects: dict[str, dict[str, Any]] = {}
    for kind, pictures in _folders(source, span.path):
        addresses = [path for path, _, _ in pictures]
        subject, _, side = kind.rpartition("/")
        if subject:
            subjects.setdefault(subject, {"name": subject})[side] = addresses
        else:
            values.setdefault(side, addresses)
    if subjects:
        values.setdefault("subjects", list(subjects.values()))
    yield Raw(name, picked(values, wanted))


def _parsed(text: bytes) -> Any:
    """What a short, flat text says: a parser needs time and memory without bound for others.

    Raises:
        yaml.YAMLError: It says nothing, or is none of this.
    """
    import yaml

    if len(text) > LONGEST_TEXT:
        raise yaml.YAMLError(f"it is longer than {LONGEST_TEXT:,} bytes")
    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        kind = type(token).__name__
        depth += kind.endswith("StartToken") - kind.endswith("EndToken")
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError("aliases (*name) are not followed; write the value out")
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
    return yaml.safe_load(text)


def _folders(source: Source, path: str) -> Iterator[tuple[str, Pictures]]:
    """``with``, ``without``, ``<subject>/with``, ``<subject>/without`` and the pictures in each, in a fixed order."""
    fs, own = connect(source.whole(path), source.storage_options)
    folder = own.rpartition("/")[0]
    if not folder:
        raise SourceError(f"{path}: put concept.yaml into a folder of its own, beside the folders with/ and without/")
    places = [(side, f"{folder}/{side}") for side in ("with", "without")]
    if fs.isdir(f"{folder}/subjects"):
        for info in sorted(fs.ls(f"{folder}/subjects", detail=True), key=lambda info: info["name"]):
            if info["type"] == "directory":
                subject = info["name"].rstrip("/")
                places += [
                    (f"{subject.rpartition('/')[2]}/{side}", f"{subject}/{side}") for side in ("with", "without")
                ]
    for kind, place in places:
        if not fs.isdir(place):
            continue
        infos = sorted(fs.ls(place, detail=True), key=lambda info: info["name"])
        yield (
            kind,
            [
                (_address(fs, info, path), int(info["size"] or 0), version_of(info))
                for info in infos
                if info["type"] != "directory" and info["name"].lower().endswith(SUFFIXES["images"])
            ],
        )


def _address(fs: Any, info: dict[str, Any], other: str) -> str:
    """The address under which fsspec opens it again; `other` is one of the same store."""
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    return str(info["name"] if local else beside(fs.unstrip_protocol(info["name"]), other))


CONCEPTS = Format(_scan, _rows, untold)
