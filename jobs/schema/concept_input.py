"""Where a job's concepts and their pictures lie: a table, or a folder tree with a ``concept.yaml`` in each folder."""

from __future__ import annotations

import os

from jobs.schema.base import Input
from pipeline.access import filesystem as filesystem_of
from pipeline.input.source import Source


def concept_source(given: Input) -> Source:
    """The input as the pipeline reads it; a folder tree of concepts is recognised."""
    from dataclasses import replace

    source = given.source()
    return replace(source, format="concepts") if source.format is None and _is_tree(source.path[0]) else source


def _is_tree(path: str) -> bool:
    filesystem, folder = filesystem_of(path)
    return bool(filesystem.isdir(folder) and filesystem.glob(f"{folder.rstrip('/')}/**/concept.yaml"))


def absolute(path: str) -> str:
    """A path that means the same in every process; other addresses as they are."""
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def folder_of(path: str) -> str:
    """The folder of an input file (a glob: the part before the first sign of it)."""
    path = absolute(path)
    if os.path.isdir(path):
        return path
    while any(sign in path for sign in "*?["):
        path = path.rpartition("/")[0]
        if not any(sign in path for sign in "*?["):
            return path
    return path.rpartition("/")[0] if "." in path.rpartition("/")[2] else path


def allowed(given: Input, root: str) -> tuple[str, ...] | None:
    """Where a row's pictures may lie beside `root`: in the folders of the input's files, and where the input allows."""
    folders = [folder for folder in dict.fromkeys(map(folder_of, given.path)) if folder != absolute(root)]
    return (*folders, *(given.allow or ())) or None
