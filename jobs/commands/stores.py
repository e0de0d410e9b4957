"""The option ``--storage-options`` of every command that reads or writes a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-options",
        metavar="K=V",
        help="An option of the store, endpoint_url=...; may be repeated. Or @FILE: the job file, or YAML.",
    ),
]

SECRETS = frozenset({"key", "secret", "token", "password", "username", "account_key", "sas_token", "connection_string"})
"""Text whatever it looks like: a key may consist of digits."""


@contextmanager
def reaching(out: str, given: Sequence[str] | None) -> Iterator[None]:
    """While it lasts, a folder and what its run names beside it are opened with these options."""
    from pipeline.access import granted

    with granted(out, parsed(given)):
        yield


def parsed(given: Sequence[str] | None) -> dict[str, Any]:
    """The options that were given; later ones replace earlier ones.

    Raises:
        ValueError: One is neither ``k=v`` nor ``@FILE``.
    """
    found: dict[str, Any] = {}
    for entry in given or ():
        found |= _from_file(Path(entry[1:])) if entry.startswith("@") else dict([_pair(entry)])
    return found


def _pair(entry: str) -> tuple[str, Any]:
    """An option and its value, which is YAML: ``client_kwargs={verify: false}``."""
    import yaml

    key, equals, text = entry.partition("=")
    if not equals or not key:
        raise ValueError("--storage-options: write an option as key=value, or @FILE for a YAML file that holds them")
    if key in SECRETS:
        return key, text
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--storage-options {key}=...: the value is not valid YAML; put it in quotes") from None


def _from_file(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--storage-options @{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"--storage-options @{path}: no YAML file") from None
    if isinstance(content, Mapping) and isinstance(content.get("storage_options"), Mapping):
        content = content["storage_options"]
    if not isinstance(content, Mapping):
        raise ValueError(f"--storage-options @{path}: should hold a mapping of options to values")
    return dict(content)
