"""The files below a folder, and a tally of those that are left out: never without a word."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from pipeline.input.source import SUFFIXES
from pipeline.storage import patiently

NAMED_KINDS = 8
"""Reasons that a note names, the commonest first."""


class LeftOut:
    """Counts what is not read, by why, with the first name of each; and links, which may stand for a file twice."""

    def __init__(self) -> None:
        self._reasons, self._links = Counter[str](), Counter[str]()
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        self._reasons[reason] += 1
        self._first.setdefault(reason, printable(name.rstrip("/").rpartition("/")[2]))

    def by_suffix(self, name: str) -> None:
        """A file of another kind than the input's format."""
        suffix = os.path.splitext(name)[1].lower()
        self.add(f"called {printable(suffix)}" if suffix else "without a suffix", name)

    def link(self, kind: str, name: str) -> None:
        """A file or folder that is read, and is a link to another."""
        self._links[kind] += 1
        self._first.setdefault(f"linked {kind}", printable(name.rpartition("/")[2]))

    def notes(self, deduped: bool = False) -> list[str]:
        """What to tell.

        Args:
            deduped: Duplicates are found by their content.
        """
        notes = []
        if self._reasons:
            common = self._reasons.most_common(NAMED_KINDS)
            kinds = ", ".join(f"{count:,} {reason} ({self._first[reason]!r})" for reason, count in common)
            rest = sum(self._reasons.values()) - sum(count for _, count in common)
            more = f", {rest:,} for other reasons" if rest else ""
            notes.append(f"left out of the input, with the first name of each kind: {kinds}{more}")
        for kind, count in self._links.items():
            told = f"{count:,} {kind} of the input are links (first: {self._first[f'linked {kind}']!r})"
            twice = "" if deduped else "; what two names stand for is read twice, unless `dedupe: content` is set"
            notes.append(told + twice)
        return notes


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are no UTF-8 become ``\\xNN``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def walk(fs: Any, folder: str, left: LeftOut, above: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Files below a folder in a fixed order, one directory listing in memory at a time.

    Names that begin with a dot are hidden. So are those that begin with ``_``, as Spark and Hive have it, but for
    pictures: cameras call them ``_DSC0001.JPG``. Linked folders are followed, unless they lead back up.

    Args:
        above: Real paths of the folders on the way here.
    """
    above = (*above, os.path.realpath(folder))
    infos = sorted(patiently(lambda: fs.ls(folder, detail=True)), key=lambda info: info["name"])
    for info in infos:
        base = info["name"].rstrip("/").rpartition("/")[2]
        if info["name"].rstrip("/") == folder.rstrip("/"):
            continue
        if base.startswith("."):
            left.add("hidden", base)
            continue
        linked = bool(info.get("islink"))
        if linked and (info := followed(fs, info, left)) is None:
            continue
        if info["type"] == "directory":
            if base.startswith("_"):
                left.add("folders whose names begin with _", base)
            elif linked and os.path.realpath(info["name"]) in above:
                left.add("links to a folder that they lie in", base)
            else:
                if linked:
                    left.link("folders", base)
                yield from walk(fs, info["name"], left, above)
        elif not underscored(base) or base.lower().endswith(SUFFIXES["images"]):
            yield info
        elif "." in base:
            left.add("files whose names begin with _", base)


def followed(fs: Any, info: dict[str, Any], left: LeftOut) -> dict[str, Any] | None:
    """What a link leads to, under the link's name; None where it leads nowhere.

    A listing tells of the link itself: its time stamp says nothing of the file's.
    """
    try:
        return cast(dict[str, Any], fs.info(info["name"]))
    except OSError:  # a link to itself, too
        left.add("links that lead nowhere", info["name"])
        return None


def underscored(name: str) -> bool:
    """Whether the last part of a path begins with ``_``."""
    return name.rpartition("/")[2].startswith("_")
