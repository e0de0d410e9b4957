"""Whether models can be had from the hub, asked once and quickly: its client tries for minutes, for each file anew."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel

from stages.models.names import ModelName

ENDPOINT = "https://huggingface.co"
PATIENCE_S = 5.0
_IS_MODEL = frozenset(part for part in get_args(ModelName) if isinstance(part, AfterValidator))


def hub_ids(settings: BaseModel) -> Iterator[str]:
    """The models that settings name and that lie in no folder of this machine."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, str):
            if not os.path.isabs(value) and (_names_model(field.annotation) or _IS_MODEL & set(field.metadata)):
                yield value
        else:
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, BaseModel):
                    yield from hub_ids(part)


def _names_model(annotation: Any) -> bool:
    return any(part in _IS_MODEL or _names_model(part) for part in get_args(annotation) if _hashable(part))


def _hashable(part: Any) -> bool:
    return getattr(part, "__hash__", None) is not None


@contextmanager
def asked(*jobs: BaseModel) -> Iterator[None]:
    """Around looking for the jobs' models: a hub that does not answer is not asked again by this process and those that
    it starts; what its cache holds serves. What is not there is told with the reason.
    """
    names = list(dict.fromkeys(name for job in jobs for name in hub_ids(job)))
    if names and not offline() and not reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        if "huggingface_hub.constants" in sys.modules:
            sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    except (ValueError, OSError) as error:
        name = next((name for name in names if name in str(error)), None)
        if name is not None and offline():
            why = "HF_HUB_OFFLINE is set" if reachable() else f"{host()} cannot be reached from here"
            error.add_note(f"{name} is no folder here, and the hub is not asked: {why}")
        raise


def offline() -> bool:
    """Whether the user, or `asked`, wants the hub left alone."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def host() -> str:
    """Of the hub, or of the mirror that HF_ENDPOINT names."""
    return urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT).hostname or ""


@cache
def reachable() -> bool:
    """Whether the hub takes a connection; behind a proxy, which knows more than we do, it is supposed to."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((host(), port), PATIENCE_S).close()
        return True
    except OSError:
        return False
