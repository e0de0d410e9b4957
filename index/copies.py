"""A reference on remote storage, copied to this machine: memory-mapped files have to lie on a disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.access import filesystem as filesystem_of
from pipeline.copies import fetch, once, place_of
from pipeline.storage import checksum, patiently

FACTS = "reference.json"


def local_copy(address: str) -> Path:
    """Where this machine keeps its copies of a reference on remote storage."""
    return place_of("reference", address)


def fetched(address: str, below: Iterable[str]) -> Path:
    """This machine's copy of a reference, one for each version of it.

    Args:
        below: Folders at the address that it may lie in.

    Raises:
        FileNotFoundError: There is no finished reference.
        OSError: It could not be fetched whole.
    """
    filesystem, root = filesystem_of(address)
    for folder in ("/".join(filter(None, (root.rstrip("/"), name))) for name in below):
        filesystem.invalidate_cache(folder)
        if not filesystem.exists(f"{folder}/{FACTS}"):
            continue
        facts = filesystem.cat_file(f"{folder}/{FACTS}")
        copy = local_copy(address) / hashlib.blake2b(facts, digest_size=8).hexdigest()
        return once(copy, lambda copy: (copy / FACTS).exists(), partial(_fill, filesystem, folder, facts))
    raise FileNotFoundError(f"no finished reference at {address}: run a job file with `job: reference` to make one")


def _fill(filesystem: Any, folder: str, facts: bytes, part: Path) -> None:
    """Fetch all files, and check them."""
    found = patiently(lambda: filesystem.find(folder, detail=True))
    for path, info in found.items():
        name = path[len(folder) :].lstrip("/")
        if name and name != FACTS and info["type"] == "file":
            fetch(filesystem, info, part / name)
    for file in (file for file in part.rglob("*") if file.is_file()):
        _check_record(file, f"{folder}/{file.relative_to(part)}")
    (part / FACTS).write_bytes(facts)


def _check_record(file: Path, address: str) -> None:
    """Compare a file with the record beside it, where it has one (`pipeline.record`)."""
    beside = file.with_name(f"{file.name}.json")
    record = json.loads(beside.read_text()) if beside.exists() else {}
    if "checksum" not in record:
        return
    with file.open("rb") as handle:
        if checksum(handle) != record["checksum"]:
            raise OSError(f"{address}: its bytes are not those that were committed; run the reference's job again")
