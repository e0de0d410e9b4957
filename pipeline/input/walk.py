"""The files below a folder, and a tally of those that are left out: never without a word."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.input.source import SUFFIXES
from pipeline.storage import patiently

NAMED_KINDS = 4
"""Kinds of files that a note names, the commonest first."""


class LeftOut:
    """Counts files that are not read, by why; and links, which may stand for one picture twice."""

    def __init__(self) -> None:
        self._reasons = Counter[str]()
        self._links = 0

    def add(self, reason: str) -> None:
        self._reasons[reason] += 1

    def by_suffix(self, name: str) -> None:
        """A file of another kind than the input's format."""
        suffix = os.path.splitext(name)[1].lower()
        self.add(f"called {suffix}" if suffix else "without a suffix")

    def link(self) -> None:
        """A file that is read, and is a link to another."""
        self._links += 1

    def notes(self) -> list[str]:
        notes = []
        if self._reasons:
            common = self._reasons.most_common(NAMED_KINDS)
            kinds = ", ".join(f"{count:,} {reason}" for reason, count in common)
            more = ", ..." if len(self._reasons) > len(common) else ""
            notes.append(f"left out of the input: {kinds}{more}")
        if self._links:
            notes.append(f"{self._links:,} files of the input are links; what two names stand for is read twice")
        return notes


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
        if base.startswith(".") or info["name"].rstrip("/") == folder.rstrip("/"):
            continue
        linked = bool(info.get("islink")) and os.path.isdir(info["name"])
        if info["type"] == "directory" or linked:
            if base.startswith("_"):
                left.add("folders whose names begin with _")
            elif linked and os.path.realpath(info["name"]) in above:
                left.add("links to a folder that they lie in")
            else:
                yield from walk(fs, info["name"], left, above)
        elif not underscored(base) or base.lower().endswith(SUFFIXES["images"]):
            yield info
        elif "." in base:
            left.add("files whose names begin with _")


def underscored(name: str) -> bool:
    """Whether the last part of a path begins with ``_``."""
    return name.rpartition("/")[2].startswith("_")
