"""Commit records of files: a file counts as written when a record beside it names its bytes and checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK_BYTES = 8 << 20


def record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes, 128 bits, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there in full, or not at all, after a crash."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def commit(draft: Path, path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Move a finished draft to its final name, then write its record, in that order.

    Returns:
        The record: ``facts`` with ``bytes`` and ``checksum``.
    """
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    record = {**facts, "bytes": draft.stat().st_size, "checksum": checksum(draft)}
    record_path(path).unlink(missing_ok=True)
    draft.replace(path)
    write_atomically(record_path(path), json.dumps(record, indent=2) + "\n")
    return record


def read(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a committed file, or None when it has none, was made from other facts, or does not match it."""
    try:
        record = json.loads(record_path(path).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if any(record.get(name) != value for name, value in facts.items()):
        return None
    if not path.exists() or path.stat().st_size != record["bytes"] or checksum(path) != record["checksum"]:
        return None
    return record
