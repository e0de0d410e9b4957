"""A reference on remote storage, copied to this machine: memory-mapped files have to lie on a disk.

Several workers of a machine ask for it at the same time. One of them fetches it, into a folder that nobody else knows,
which is renamed once all of it is there: what stands under the final name is whole, and never written again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.access import filesystem as filesystem_of
from pipeline.storage import checksum, patiently

FACTS = "reference.json"


def local_copy(address: str) -> Path:
    """Where this machine keeps its copies of a reference on remote storage."""
    name = hashlib.blake2b(address.rstrip("/").encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"latentmill-reference-{name}"


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
        copies = local_copy(address)
        copies.mkdir(parents=True, exist_ok=True)
        copy = copies / hashlib.blake2b(facts, digest_size=8).hexdigest()
        with open(f"{copy}.lock", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel lets go of it if its holder dies
            if not (copy / FACTS).exists():
                _fetch(filesystem, folder, copy, facts)
        return copy
    raise FileNotFoundError(f"no finished reference at {address}: run a job file with `job: reference` to make one")


def _fetch(filesystem: Any, folder: str, copy: Path, facts: bytes) -> None:
    """Under the lock: fetch all files, check them, and put the folder in place."""
    for left in (copy, *copy.parent.glob(f"{copy.name}.*.part")):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    part = copy.with_name(f"{copy.name}.{uuid4().hex}.part")
    part.mkdir()
    try:
        for info in patiently(lambda: filesystem.ls(folder, detail=True)):
            name = info["name"].rpartition("/")[2]
            if name and name != FACTS and info["type"] == "file":
                patiently(lambda info=info, name=name: filesystem.get_file(info["name"], str(part / name)))  # type: ignore[misc]
                _check(part / name, int(info["size"]), f"{folder}/{name}")
        for file in part.iterdir():
            _check_record(file, f"{folder}/{file.name}")
        (part / FACTS).write_bytes(facts)
        part.rename(copy)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check(file: Path, size: int, address: str) -> None:
    if (found := file.stat().st_size) != size:
        raise OSError(f"{address}: {found} of {size} bytes were fetched; try again")


def _check_record(file: Path, address: str) -> None:
    """Compare a file with the record beside it, where it has one (`pipeline.record`)."""
    beside = file.with_name(f"{file.name}.json")
    record = json.loads(beside.read_text()) if beside.exists() else {}
    if "checksum" not in record:
        return
    with file.open("rb") as handle:
        if checksum(handle) != record["checksum"]:
            raise OSError(f"{address}: its bytes are not those that were committed; run the reference's job again")
