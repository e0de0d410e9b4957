"""What is fitted to a captioned reference, kept on each machine: made by the first process that asks, found by others.

It lies among the machine's temporary files, since a reference may be on a store, or somebody else's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from index.captions import FOLDER
from pipeline import record
from pipeline.copies import once, place_of

FILE = "fit.safetensors"
Arrays = Mapping[str, np.ndarray]


def kept(reference: Path, asked: Mapping[str, Any], fit: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """A fit to a reference; made, if there is none on this machine or it is damaged.

    Args:
        reference: The folder; one that was made again under the same path is another one.
        asked: What decides the fit beside the reference, as JSON has it.
        fit: Makes it; what it raises is raised.

    Raises:
        OSError: There is no room for it among temporary files.
    """
    from safetensors.numpy import load_file

    facts = {**_made_of(reference), **asked}
    name = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def whole(folder: Path) -> bool:
        return record.read(folder / FILE, facts) is not None

    found: dict[str, np.ndarray] = load_file(
        once(place_of("fit", str(reference)) / name, whole, lambda folder: _fill(folder, facts, fit())) / FILE
    )
    return found


def _made_of(reference: Path) -> dict[str, str]:
    """Checksums of the images, of the captions' embeddings, and of which belongs to which."""

    def checksum(file: Path) -> str:
        return str(json.loads(record.record_path(file).read_text())["checksum"])

    below = reference / FOLDER
    images = json.loads((reference / "reference.json").read_text())["vectors"]
    return {"images": images, "texts": checksum(below / "vectors.npy"), "rows": checksum(below / "rows.npy")}


def _fill(folder: Path, facts: Mapping[str, Any], arrays: Arrays) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "fit.tmp")
    record.commit(folder / "fit.tmp", folder / FILE, facts)
