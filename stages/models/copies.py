"""Models at an address (``s3://bucket/folder``, any that fsspec opens): copied to this machine once, then as any other.

What loads a model asks `here` for its name first. Settings, plans and cards keep the address.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.access import filesystem as filesystem_of
from pipeline.copies import fetch, once, place_of
from pipeline.storage import patiently, version_of

OTHER_WEIGHTS = (
    ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite", ".gguf", ".ot",
)  # fmt: skip
"""Weights in forms that nobody reads where safetensors lie beside them."""


def here(name: str) -> str:
    """A model's name as libraries take it: of an address the copy on this machine, of any other the name itself.

    Raises:
        FileNotFoundError: There is nothing at the address.
        OSError: The store cannot be asked, or did not give all of it.
    """
    return _copy(name) if "://" in name else name


@lru_cache(maxsize=64)
def _copy(address: str) -> str:
    """The copy of a folder, or of one file; a process goes by the version that it found first."""
    try:
        filesystem, root = filesystem_of(address)
    except (ImportError, ValueError) as error:
        raise OSError(f"{address}: {error}") from None
    root = root.rstrip("/")
    filesystem.invalidate_cache()
    found: Mapping[str, Any] = patiently(lambda: filesystem.find(root, detail=True))
    files = {path[len(root) :].lstrip("/"): info for path, info in found.items()}
    if not files:
        raise FileNotFoundError(f"no model at {address}: nothing lies there")
    alone = set(files) == {""}
    files = {address.rpartition("/")[2]: files[""]} if alone else _read(files)
    told = [(name, int(info["size"]), version_of(info)) for name, info in sorted(files.items())]
    version = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
    copy = once(place_of("model", address) / version, partial(_whole, files), partial(_fill, filesystem, files))
    return str(copy / next(iter(files)) if alone else copy)


def _read(files: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a model's folder: no weights twice, nothing hidden."""
    folders = {str(PurePosixPath(name).parent) for name in files if name.endswith(".safetensors")}
    pipeline = "model_index.json" in files
    found = {}
    for name, info in files.items():
        path = PurePosixPath(name)
        twice = path.suffix in OTHER_WEIGHTS and str(path.parent) in folders
        beside = pipeline and len(path.parts) == 1 and path.suffix in (".safetensors", *OTHER_WEIGHTS)
        if not (twice or beside or any(part.startswith(".") for part in path.parts)):
            found[name] = info
    return found


def _whole(files: Mapping[str, Any], copy: Path) -> bool:
    paths = ((copy / name, int(info["size"])) for name, info in files.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _fill(filesystem: Any, files: Mapping[str, Any], part: Path) -> None:
    for name, info in files.items():
        fetch(filesystem, info, part / name)


def brought(name: str, target: str) -> tuple[list[str], str]:
    """How a card speaks of a model: lines of Python that bring it to where they run, and what they load then.

    Args:
        target: What the lines call the copy of an address.
    """
    if "://" not in name:
        return [], name
    ends = ("", PurePosixPath(name).suffix) if name.endswith(".safetensors") else ("/", "")
    lines = [
        "import fsspec",
        f'store, path = fsspec.url_to_fs("{name.rstrip("/")}")',
        f'store.get(path + "{ends[0]}", "{target}{ends[1]}{ends[0]}", recursive=True)',
    ]
    return lines, f"{target}{ends[1]}"
