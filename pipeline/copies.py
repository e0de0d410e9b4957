"""Folders of a store, copied to this machine once: for what has to lie on a disk, memory-mapped files and models.

Several workers of a machine ask for one at the same time. One of them fetches it, into a folder that nobody else knows,
which is renamed once all of it is there: what stands under the final name is whole, and never written again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.storage import patiently


def place_of(kind: str, address: str) -> Path:
    """The folder in which this machine keeps its copies of what lies at an address, one for each version of it."""
    name = hashlib.blake2b(address.rstrip("/").encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"latentmill-{kind}-{name}"


def once(copy: Path, whole: Callable[[Path], bool], fill: Callable[[Path], None]) -> Path:
    """A copy, made by the first process of this machine that asks for it; the others wait, and find it.

    Args:
        copy: Where it stands when it is there.
        whole: Whether it is: temporary folders are swept on some machines.
        fill: Fetches all of it into an empty folder.

    Raises:
        OSError: It could not be fetched, or the place belongs to another user of this machine.
    """
    copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if copy.parent.stat().st_uid != os.getuid():
        raise OSError(f"{copy.parent} belongs to another user of this machine: set TMPDIR to a folder of your own")
    with open(f"{copy}.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel lets go of it if its holder dies
        if whole(copy):
            return copy
        for left in (copy, *copy.parent.glob(f"{copy.name}.*.part")):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        part = copy.with_name(f"{copy.name}.{uuid4().hex}.part")
        part.mkdir()
        try:
            fill(part)
            part.rename(copy)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return copy


def fetch(filesystem: Any, info: Mapping[str, Any], target: Path) -> None:
    """A file of a store, by its entry in a listing.

    Raises:
        OSError: It could not be fetched whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    patiently(lambda: filesystem.get_file(info["name"], str(target)))
    if (found := target.stat().st_size) != int(info["size"]):
        raise OSError(f"{info['name']}: {found} of {info['size']} bytes were fetched; try again")
