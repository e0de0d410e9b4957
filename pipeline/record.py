"""Commit records of files that one process makes: a file counts once a record beside it names its size and checksum.

The rule is that of a run's shards (`pipeline.output.commit`), and so is what it rests on: `pipeline.storage` makes a
file durable, puts a record in place as a whole, and takes the checksum. Who may write is not the same, and is why there
are two. A shard may be finished by several workers at once, on any store: each writes under a name of its own, the
record is created only if there is none, and what it says is final. A part of an index has one writer, on one disk, and
one name that readers know; what it was made from may change, and then its record goes, the file is replaced, and a
record of the new facts is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.storage import Folder, checksum


def record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a small JSON file so that it is there in full, or not at all, after a crash."""
    Folder.at(str(path.parent)).write(path.name, (json.dumps(facts, indent=2) + "\n").encode())


def commit(draft: Path, path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Move a finished draft to its final name in the same folder, then write its record, in that order.

    Returns:
        The record: ``facts`` with ``bytes`` and ``checksum``.
    """
    folder = Folder.at(str(path.parent))
    with draft.open("rb") as file:
        os.fsync(file.fileno())
        record = {**facts, "bytes": draft.stat().st_size, "checksum": checksum(file)}
    folder.remove(record_path(path).name)
    folder.move(draft.name, path.name)
    write_facts(record_path(path), record)
    return record


def read(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a committed file, or None when it has none, was made from other facts, or does not match it."""
    try:
        record: dict[str, Any] = json.loads(record_path(path).read_text())
        if any(record.get(name) != value for name, value in facts.items()):
            return None
        with path.open("rb") as file:
            whole = path.stat().st_size == record["bytes"] and checksum(file) == record["checksum"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if whole else None
