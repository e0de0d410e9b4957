"""Which model is this: a short hash of its weights and configuration, whatever path or hub id it is reached by.

Two copies of a model have one fingerprint, and a model that was trained on has another. On the hub nothing but the
configuration is downloaded: the hub publishes the SHA-256 of each weight file, and locally it is computed once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stages.models.files import files_of
from stages.models.weights import choose

INCIDENTAL = {"transformers_version", "_diffusers_version", "_name_or_path", "architectures", "torch_dtype", "dtype"}


def describe_model(
    path: str,
    revision: str | None = None,
    subfolder: str = "",
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> dict[str, str]:
    """What `pipeline.contract.StageInfo.models` holds of one model: of the weights that will be read.

    Args:
        path: A local folder or a hub id.
        revision: Branch, tag or commit on the hub.
        subfolder: Of a pipeline's folder, for instance ``image_encoder``.
        variant, allow_pickle: See `stages.models.weights.weights_of`.

    Returns:
        ``path`` (with the subfolder), ``revision`` and ``fingerprint`` (32 hex digits); from the hub, the ``commit``
        that the revision stands for today.

    Raises:
        FileNotFoundError: There is no model there.
        WeightsError: Its weights are in no form that is read.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    files = files_of(path, revision, subfolder)
    weights = choose(files, where, variant, allow_pickle)
    config = json.loads(files.text("config.json"))
    return {
        "path": where,
        "revision": revision or "",
        "fingerprint": digest([telling(config), [files.digest(name) for name in weights.files]]),
        **({"commit": files.commit} if files.commit else {}),
    }


def telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration says how the network computes."""
    return {name: value for name, value in config.items() if name not in INCIDENTAL}


def digest(content: object) -> str:
    """A fingerprint of plain values."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
