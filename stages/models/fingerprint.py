"""Which model is this: a short hash of its weights and configuration, whatever path or hub id it is reached by.

Two copies of a model have one fingerprint, and a model that was trained on has another. On the hub nothing but the
configuration is downloaded: the hub publishes the SHA-256 of each weight file, and locally it is computed once.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

WEIGHTS = ("model", "diffusion_pytorch_model", "pytorch_model")
INCIDENTAL = {"transformers_version", "_diffusers_version", "_name_or_path", "architectures", "torch_dtype", "dtype"}


def describe_model(path: str, revision: str | None = None, subfolder: str = "") -> dict[str, str]:
    """What `pipeline.contract.StageInfo.models` holds of one model.

    Args:
        path: A local folder or a hub id.
        revision: Branch, tag or commit on the hub.
        subfolder: Of a pipeline's folder, for instance ``image_encoder``.

    Returns:
        ``path`` (with the subfolder), ``revision`` and ``fingerprint`` (32 hex digits); from the hub, the ``commit``
        that the revision stands for today.

    Raises:
        FileNotFoundError: There is no model there.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        config, digests, commit = *_local(local / subfolder), ""
    elif local.is_absolute() or path.startswith("."):
        raise FileNotFoundError(f"no model folder at {path}")
    else:
        config, digests, commit = _hub(path, revision, subfolder)
    kept = {name: value for name, value in config.items() if name not in INCIDENTAL}
    text = json.dumps([kept, digests], sort_keys=True)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {
        "path": f"{path}/{subfolder}" if subfolder else path,
        "revision": revision or "",
        "fingerprint": fingerprint,
        **({"commit": commit} if commit else {}),
    }


def _weight_names(names: set[str]) -> list[str]:
    """The files that `from_pretrained` would load: safetensors before pickles, whole files before the split ones."""
    for suffix in ("safetensors", "bin"):
        for stem in WEIGHTS:
            pattern = re.compile(rf"{stem}(\.fp16)?(-\d{{5}}-of-\d{{5}})?\.{suffix}")
            found = sorted(name for name in names if pattern.fullmatch(name))
            whole = [name for name in (f"{stem}.{suffix}", f"{stem}.fp16.{suffix}") if name in found]
            plain = [name for name in found if ".fp16" not in name]
            if found:
                return whole[:1] or plain or found
    return []


def _local(folder: Path) -> tuple[dict[str, Any], list[str]]:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no model in {folder}: it holds no config.json")
    names = _weight_names({file.name for file in folder.iterdir()})
    if not names:
        raise FileNotFoundError(f"no weights in {folder}: neither safetensors nor a .bin file")
    return json.loads((folder / "config.json").read_text()), [_sha256(folder / name) for name in names]


def _sha256(file: Path) -> str:
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names its files by their checksum
    status = target.stat()
    return _hash_file(str(target), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_file(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@lru_cache(maxsize=256)
def _hub(repository: str, revision: str | None, subfolder: str) -> tuple[dict[str, Any], list[str], str]:
    """Configuration, digests of the weights, commit."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        config_file = hf_hub_download(repository, f"{prefix}config.json", revision=revision)
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        except (OfflineModeIsEnabled, OSError):  # offline, with the model in the hub's cache
            return *_local(Path(config_file).parent), _cached_commit(config_file)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{repository}: neither a folder nor a model on the hub that can be had ({error})"
        ) from None
    files = {f.rfilename.removeprefix(prefix): f for f in info.siblings or [] if f.rfilename.startswith(prefix)}
    names = _weight_names(set(files))
    if not names:
        raise FileNotFoundError(f"no weights in {repository}/{subfolder}")
    digests = [lfs.sha256 if (lfs := files[name].lfs) else str(files[name].blob_id) for name in names]
    return json.loads(Path(config_file).read_text()), digests, str(info.sha or "")


def _cached_commit(file: str) -> str:
    """The hub's cache keeps files below ``snapshots/<commit>``."""
    parts = Path(file).parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""
