"""Which kinds of job there are. A kind's module is imported when a job file asks for it.

A new job is one line in `KINDS` and one module with a `RowJob` subclass; see docs/architecture.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from jobs.schema.base import Job, RowJob

KINDS: dict[str, str] = {
    "reference": "jobs.kinds.reference:Reference",
    "invert-prompts": "jobs.kinds.invert_prompts:InvertPrompts",
    "decode": "jobs.kinds.decode:Decode",
    "caption": "jobs.kinds.caption:Caption",
    "invert-images": "jobs.kinds.invert_images:InvertImages",
    "learn-concepts": "jobs.kinds.learn_concepts:LearnConcepts",
    "rare-concepts": "jobs.kinds.rare_concepts:RareConcepts",
    "select-corpus": "jobs.kinds.select_corpus:SelectCorpus",
    "judge-corpus": "jobs.kinds.judge_corpus:JudgeCorpus",
    "train-inverter": "jobs.kinds.train_inverter:TrainInverter",
    "invert-text": "jobs.kinds.train_inverter:InvertText",
    "chain": "jobs.kinds.chain:Chain",
}
"""Name in the job file -> ``module:Class``."""


def kinds() -> list[str]:
    """The kinds that this installation has, in the order of `KINDS`."""
    return [kind for kind, target in KINDS.items() if find_spec(target.partition(":")[0])]


def find(kind: str) -> type[Job]:
    """The model class of a kind.

    Raises:
        KeyError: This installation has no such kind.
    """
    if kind not in kinds():
        raise KeyError(kind)
    module, _, name = KINDS[kind].partition(":")
    job: type[Job] = getattr(importlib.import_module(module), name)
    return job


def stored_job(plan: Mapping[str, Any]) -> RowJob | None:
    """The job as a plan remembers it; None where its kind is not installed or its settings have changed."""
    config = dict(plan.get("config") or {})
    try:
        job = find(config["job"]).model_validate({**config, "input": "unused"})
    except (KeyError, ValueError):
        return None
    return job if isinstance(job, RowJob) else None


def nearest(word: Any, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for a misspelt word, or nothing."""
    matches = get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown_kind(kind: Any, allowed: Iterable[str]) -> str:
    """What to tell a user whose ``job:`` is missing or names no kind."""
    allowed = list(allowed)
    problem = "which job? The key is missing." if kind is None else f"unknown kind of job {kind!r}."
    return f"{problem}{nearest(kind, allowed)} Allowed: {', '.join(allowed)}."
