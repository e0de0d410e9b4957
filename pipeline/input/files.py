"""From a `Source` to the list of files it stands for, in a fixed order, with names that do not change between runs."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from pipeline.access import connect
from pipeline.addresses import beside, unsigned
from pipeline.input.source import FORMATS, GENERATED, SUFFIXES, Format, Source, SourceError
from pipeline.input.streams import COMPRESSED
from pipeline.input.walk import LeftOut, followed, printable, underscored, walk
from pipeline.storage import patiently, version_of

LINES = ("jsonl", "csv", "text")
"""Formats that may be compressed as a whole."""
OWN = "_latentmill"
"""Folder of a run's bookkeeping inside its output folder; `pipeline.output.dataset` fills it."""
SAMPLED_NAMES = 1000
COMPANIONS = {"text": "images", "parquet": "webdataset", "jsonl": "webdataset"}
"""Formats of files that say something of another beside them: captions of pictures; img2dataset's lists and statistics
(``00000.parquet`` and ``00000_stats.json`` of ``00000.tar``)."""
MANY_FILES = ("datasets", "concepts")
"""Formats whose rows are made of more files than those that are listed."""


@dataclass(frozen=True)
class InputFile:
    """One file of an input.

    Attributes:
        name: Path below the common folder of the input; part of derived ids.
        path: Full path or address.
        size: Bytes.
        version: Modification time, or an object store's ETag: changes when the content does.
    """

    name: str
    path: str
    size: int
    version: str


def format_of(name: str) -> str | None:
    """The format a file name stands for, or None."""
    name = name.lower()
    for format, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return format
        if format in LINES and name.endswith(tuple(s + c for s in suffixes for c in COMPRESSED if c != ".tgz")):
            return format
    return None


def _stem(path: str) -> str:
    """What names of files have in common that belong together."""
    return path.removesuffix("_stats.json") if path.endswith("_stats.json") else path.rpartition(".")[0]


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


@dataclass(frozen=True)
class _Place:
    """One entry of ``Source.path``: its filesystem, the folder that names are relative to, what kind of thing it is."""

    fs: Any
    path: str
    root: str
    kind: str  # file, folder, pattern

    def infos(self, left: LeftOut) -> Iterator[dict[str, Any]]:
        if self.kind == "file":
            yield patiently(lambda: self.fs.info(self.path))
        elif self.kind == "folder":
            yield from walk(self.fs, self.path, left)
        else:
            found = patiently(lambda: self.fs.glob(self.path, detail=True))
            for name in sorted(found):
                info = followed(self.fs, found[name], left) if found[name].get("islink") else found[name]
                if info is not None and info["type"] != "directory":
                    yield info


def _place(entry: str, source: Source) -> _Place:
    try:
        fs, path = connect(source.whole(entry), source.storage_options)
    except (ImportError, ValueError) as error:
        raise SourceError(f"{entry}: {error}") from None
    path = path.rstrip("/") or "/"
    try:
        if patiently(lambda: fs.isfile(path)):
            return _Place(fs, path, unsigned(path).rpartition("/")[0], "file")
        if patiently(lambda: fs.isdir(path)):
            return _Place(fs, path, path, "folder")
    except PermissionError as error:
        raise SourceError(f"{entry}: no permission to read it ({error})") from None
    if not _is_pattern(path):
        raise SourceError(f"{entry}: there is no such file or folder")
    parts = path.split("/")
    root = "/".join(parts[: next(i for i, part in enumerate(parts) if _is_pattern(part))])
    return _Place(fs, path, root, "pattern")


def parts(plan: Mapping[str, Any]) -> str:
    """What the names of a run's published files match, by its plan, and no other run's.

    Raises:
        ValueError: The plan's run has no name as runs have, which would lead who knows where.
    """
    if not plan.get("named_at_commit"):
        return "data/part-*.parquet"
    if not re.fullmatch("[0-9a-f]+", str(plan.get("run"))):
        raise ValueError(f"the run is named {str(plan.get('run'))[:100]!r}")
    return f"data/part-*-{plan['run']}.parquet"


def _parts(place: _Place, entry: str) -> str:
    """Of the run in a folder."""
    try:
        return parts(dict(json.loads(patiently(partial(place.fs.cat_file, f"{place.path}/{OWN}/plan.json")))))
    except (ValueError, TypeError) as error:
        raise SourceError(f"{entry}: {OWN}/plan.json is damaged ({error}); name the folder's `data` instead") from None


def _own_output(place: _Place) -> bool:
    return place.kind == "folder" and patiently(partial(place.fs.exists, f"{place.path}/{OWN}/plan.json"))


def _saved_dataset(place: _Place) -> bool:
    marks = ("state.json", "dataset_dict.json")
    return place.kind == "folder" and any(patiently(partial(place.fs.exists, f"{place.path}/{mark}")) for mark in marks)


class _Saved:
    """What the bookkeeping of ``save_to_disk`` says of a folder: files of an earlier save may still lie there."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._states: dict[str, Any] = {}

    def names(self, path: str) -> bool:
        """Whether a data file belongs to the dataset that was saved last (caches never do)."""
        folder, _, base = path.rpartition("/")
        splits = self._read(f"{self._place.path}/dataset_dict.json").get("splits")
        below = path[len(self._place.path) :].lstrip("/").partition("/")[0]
        if splits is not None and below not in splits:
            return False
        files = self._read(f"{folder}/state.json").get("_data_files")
        if files is None:
            return not base.startswith(("cache-", "tmp"))
        return base in {str(file.get("filename", "")).rpartition("/")[2] for file in files}

    def _read(self, path: str) -> dict[str, Any]:
        if path not in self._states:
            try:
                said = json.loads(patiently(partial(self._place.fs.cat_file, path)))
            except (FileNotFoundError, NotADirectoryError):
                said = {}
            except ValueError as error:
                raise SourceError(f"{path}: is no JSON ({error}); save the dataset again") from None
            self._states[path] = said if isinstance(said, dict) else {}
        return self._states[path]


def resolve(source: Source) -> Source:
    """Settle the format, and what a finished run's output folder stands for.

    Raises:
        SourceError: The format cannot be told, or an entry does not exist.
    """
    if source.format is not None and source.format not in (*FORMATS, *GENERATED.values()):
        raise SourceError(f"unknown input format {source.format!r}; known: {', '.join(FORMATS)}")
    if not source.path:
        raise SourceError("the input names no path")
    for begin, generated in GENERATED.items():
        if any(entry.startswith(begin) for entry in source.path):
            if source.format not in (None, generated) or not all(entry.startswith(begin) for entry in source.path):
                raise SourceError(f"{begin} cannot be mixed with other inputs or formats")
            return replace(source, format=cast(Format, generated))
    paths, formats, hidden = [], Counter[str](), Counter[str]()
    stems: dict[str, set[str]] = {}
    ids = source.id
    for entry in source.path:
        place = _place(entry, source)
        if source.format in (None, "parquet") and _own_output(place):
            if not patiently(partial(place.fs.exists, f"{place.path}/_SUCCESS")):
                raise SourceError(f"{entry}: this run is not complete; run its job again, then read it")
            paths.append(f"{entry.rstrip('/')}/{_parts(place, entry)}")
            formats["parquet"] += SAMPLED_NAMES
            ids = ids or "id"
            continue
        paths.append(entry)
        if source.format is not None:
            continue
        if _saved_dataset(place):
            formats["datasets"] += SAMPLED_NAMES
            continue
        count = -1
        for count, info in enumerate(place.infos(LeftOut())):
            found = format_of(unsigned(info["name"]))
            if found is not None:
                (hidden if place.kind == "folder" and underscored(info["name"]) else formats)[found] += 1
                stems.setdefault(found, set()).add(_stem(info["name"]))
            elif place.kind == "file":
                known = ", ".join(FORMATS)
                raise SourceError(f"{entry}: the name does not tell the format; set format to one of {known}")
            if count >= SAMPLED_NAMES:
                for companion in COMPANIONS:  # what it belongs to may come next
                    stems.get(companion, set()).discard(_stem(info["name"]))
                break
        if count < 0:
            nothing = "matches no file" if place.kind == "pattern" else "holds no file"
            raise SourceError(f"{entry}: {nothing}; check the path")
    format = source.format
    if format is None:
        formats = formats or hidden
        if not formats:
            raise SourceError(f"{', '.join(source.path)}: no file of a known format; set format, or check the path")
        for companion, owner in COMPANIONS.items():
            if {companion, owner} <= set(formats) and stems[companion] <= stems[owner]:
                del formats[companion]
        if len(formats) > 1:
            mixed, entries = " and ".join(sorted(formats)), ", ".join(source.path)
            table = next((form for form in ("csv", "jsonl", "parquet") if {form, "images"} == set(formats)), None)
            if table and all(stem.rpartition("/")[2] == "metadata" for stem in stems[table]):
                raise SourceError(
                    f"{entries}: is a folder of pictures with tables of what they show. To read both: "
                    f"path: {source.path[0].rstrip('/')}/**/metadata{SUFFIXES[table][0]}, with columns: "
                    "{image: file_name, prompt: text}, by the table's names. To read the pictures alone: format: images"
                )
            raise SourceError(f"{entries}: holds {mixed}; set format, or name the files with a glob")
        format = cast(Format, next(iter(formats)))
    return replace(source, path=tuple(paths), format=format, id=ids)


def list_files(source: Source, left: LeftOut | None = None) -> Iterator[InputFile]:
    """The files of a resolved source, in the order of its entries and sorted within each.

    One directory's listing is held in memory at a time (a glob's matches are held together).

    Args:
        left: Counts what is left out.

    Raises:
        SourceError: An entry matches nothing.
    """
    if source.format in GENERATED.values():
        yield from (InputFile(entry.partition("://")[2], entry, 0, "") for entry in source.path)
        return
    places = [_place(entry, source) for entry in source.path]
    roots = [place.root for place in places]
    common = os.path.commonpath(roots) if len({root.startswith("/") for root in roots}) == 1 else ""
    assert source.format is not None
    left = left or LeftOut()
    for entry, place in zip(source.path, places, strict=True):
        found = False
        saved = _Saved(place)
        for info in place.infos(left):
            path = unsigned(info["name"])
            base = path.rpartition("/")[2]
            if (
                place.kind == "folder"
                and not base.lower().endswith(SUFFIXES[source.format])
                and (format_of(base) != source.format)
            ):
                if source.format not in MANY_FILES and (source.format, format_of(base)) != ("images", "text"):
                    left.by_suffix(base)
                continue
            if source.format == "images" and format_of(base) == "text":
                continue
            if source.format == "datasets" and not saved.names(path):
                left.add("data files that state.json does not name", base)
                continue
            if info.get("islink"):
                left.link("files", base)
            found = True
            name = path[len(common) :].lstrip("/") if path.startswith(common) else path
            address = beside(place.fs.unstrip_protocol(path), entry) if _remote(place.fs) else path
            yield InputFile(printable(name), address, int(info["size"] or 0), version_of(info))
        if not found:
            raise SourceError(f"{entry}: no {source.format} file there")


def _remote(fs: Any) -> bool:
    return "file" not in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
