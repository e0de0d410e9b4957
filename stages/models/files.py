"""The files of a model's folder, wherever it is: on disk, on the hub, or in the hub's cache.

Configurations are read as what they are, JSON: diffusers' classes, whose `load_config` does the same, take five seconds
to import, more than all else that planning a job does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from stages.models.copies import here

INDEX = "model_index.json"
"""Of a pipeline: its class, and those of its parts."""
CONFIG = "config.json"
"""Of a network."""
SCHEDULER = "scheduler_config.json"


def read_config(path: str, name: str = CONFIG, *, revision: str | None = None, folder: str = "") -> dict[str, Any]:
    """A configuration in a model's folder.

    Args:
        path: A local folder, an address or a hub id.
        name: `INDEX`, `CONFIG` or `SCHEDULER`.
        revision: Branch, tag or commit on the hub.
        folder: Of a pipeline's folder, for instance ``unet``.

    Raises:
        OSError: There is none, it cannot be had, or it is no JSON; the message is one line.
    """
    place = Path(here(path))
    if place.is_dir():
        file = place / folder / name
    elif place.exists() or place.is_absolute():
        raise NotADirectoryError(f"{path} is no folder, and so none with a {name}")
    else:
        file = _from_hub(path, f"{folder}/{name}" if folder else name, revision)
    try:
        read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {name} in {file.parent}") from None
    except ValueError as error:
        raise OSError(f"{file} is no JSON: {error}") from None
    return read


def _from_hub(repository: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{repository} is no folder, and no {name} can be had from the hub ({reason})") from None


class Files(Protocol):
    """The files in one folder, by name; `commit` is that of the hub, "" for a folder of one's own."""

    @property
    def commit(self) -> str: ...

    @property
    def names(self) -> frozenset[str]: ...

    def text(self, name: str) -> str: ...

    def digest(self, name: str) -> str:
        """SHA-256 of a file (git's own id of a small one on the hub)."""


def files_of(path: str, revision: str | None = None, subfolder: str = "") -> Files:
    """The files of a model; of a model on the hub no more than the configuration is downloaded.

    Args:
        path: A local folder, an address or a hub id.
        revision: Branch, tag or commit on the hub.
        subfolder: Of a pipeline's folder, for instance ``image_encoder``.

    Raises:
        FileNotFoundError: There is no model.
    """
    local = Path(here(path)).expanduser()
    if local.is_dir():
        return _local(local / subfolder)
    if local.is_absolute() or path.startswith("."):
        raise FileNotFoundError(f"no model folder at {path}")
    return _hub(path, revision, subfolder)


@dataclass(frozen=True)
class LocalFiles:
    """A folder on disk."""

    folder: Path
    commit: str = ""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.folder.iterdir())

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def digest(self, name: str) -> str:
        return sha256(self.folder / name)


def _local(folder: Path, commit: str = "") -> LocalFiles:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no model in {folder}: it holds no config.json")
    return LocalFiles(folder, commit)


def sha256(file: Path) -> str:
    """A file's SHA-256, computed once for each version of it."""
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names its files by their checksum
    status = target.stat()
    return _hash_file(str(target), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_file(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class HubFiles:
    """A folder of a repository on the hub."""

    repository: str
    commit: str
    prefix: str
    digests: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.digests)

    def text(self, name: str) -> str:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repository, f"{self.prefix}{name}", revision=self.commit or None)).read_text()

    def digest(self, name: str) -> str:
        return self.digests[name]


@lru_cache(maxsize=256)
def _hub(repository: str, revision: str | None, subfolder: str) -> Files:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        config_file = hf_hub_download(repository, f"{prefix}config.json", revision=revision)
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        except (OfflineModeIsEnabled, OSError):  # offline, with the model in the hub's cache
            return _local(Path(config_file).parent, _cached_commit(config_file))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{repository}: neither a folder nor a model on the hub that can be had ({error})"
        ) from None
    files = {f.rfilename.removeprefix(prefix): f for f in info.siblings or [] if f.rfilename.startswith(prefix)}
    digests = {name: lfs.sha256 if (lfs := file.lfs) else str(file.blob_id) for name, file in files.items()}
    return HubFiles(repository, str(info.sha or ""), prefix, digests)


def _cached_commit(file: str) -> str:
    """The hub's cache keeps files below ``snapshots/<commit>``."""
    parts = Path(file).parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""
