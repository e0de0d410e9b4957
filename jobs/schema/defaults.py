"""Settings in force that a job file does not name, so that a user sees them and can copy a line into the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from jobs.schema.base import COMMON, Job
from pipeline.contract import as_job_file, keys_of


def unnamed(job: Job) -> tuple[dict[str, Any], list[str]]:
    """What a job goes by beside what its file says.

    Returns:
        Settings under the keys of a job file, and the dotted keys of those that are null or empty. A list of blocks
        (``methods``) of which any lacks a setting is there as a whole: it takes the place of the file's.
    """
    left_out: list[str] = []
    return _said(job, as_job_file(job), "", left_out, whole=False), left_out


def _said(block: BaseModel, keyed: Mapping[str, Any], prefix: str, left_out: list[str], whole: bool) -> dict[str, Any]:
    """A block's settings, all or those that were not given, without what is null or empty by itself."""
    found: dict[str, Any] = {}
    for name, key in sorted(keys_of(type(block)).items(), key=lambda pair: pair[0] != "method"):
        value, given = getattr(block, name), name in block.model_fields_set
        if _is_nothing(value) and (not given or key not in keyed):
            left_out.append(prefix + key)
        elif isinstance(value, BaseModel):
            inner = _said(value, keyed[key], f"{prefix}{key}.", left_out, whole or not given)
            found |= {key: inner} if inner or not given else {}
        elif _are_blocks(value):
            pairs = list(zip(value, keyed[key], strict=True))
            if whole or not given or any(_said(*pair, "", [], whole=False) for pair in pairs):
                found[key] = [_said(*pair, "", [], whole=True) for pair in pairs]
        elif whole or not given:
            found[key] = keyed[key]
    return found


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, Sequence, Mapping)) and not value)


def _are_blocks(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, BaseModel) for item in value)


def as_yaml(job: Job) -> Iterator[str]:
    """The same as lines of a job file: a key a line, first those of the job's own, then those that every job has."""
    settings, left_out = unnamed(job)
    for key in sorted(settings, key=lambda key: key in COMMON):
        yield from _lines(key, settings[key])
    own = [key for key in left_out if key.partition(".")[0] not in COMMON]
    if own:
        yield f"# null or empty: {', '.join(own)}"


def _lines(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        yield f"{key}:"
        yield from (f"  - {_flow(item)}" for item in value)
    else:
        yield f"{key}: {_flow(value)}"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 30)
    return text.strip()[1:-1]
