"""The columns of a learned concept: declared, and filled, in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.contract import Column, Row
from stages.concepts.prepare import Prepared
from stages.concepts.samples import sheet
from stages.concepts.settings import LegoSettings

COLUMNS = (
    Column("name", "string", doc="the concept's name as it stands in its tokens"),
    Column("phrase", "string", doc="the concept as it is written in a prompt"),
    Column("tokens", "json", doc="the new words, in the order of `embeddings`; subjects last"),
    Column("words", "json", doc="what each of them stands for"),
    Column("norms", "json", doc="norm of each embedding"),
    Column("start_norms", "json", doc="norm of the word it started from"),
    Column("loss", "float64", doc="noise-prediction loss, mean over the last window"),
    Column("context_loss", "float64", doc="context loss, mean over the last window"),
    Column("steps", "int64"),
    Column("stopped", "string", doc="limit, or stalled"),
    Column("seconds", "float64", doc="time in its slot"),
    Column("pictures", "int64", doc="training pictures"),
    Column("curve", "json", doc="step, losses and norms at the end of each window"),
    Column("settings", "json"),
    Column("training", "image", doc="the training pictures, subject by subject, those with the concept first"),
)
"""What is added to a row, beside `embeddings`, whose shape depends on the model, and `samples`."""


def columns(max_words: int, width: int, samples: bool) -> tuple[Column, ...]:
    """All of them.

    Args:
        max_words: Most new words a concept has.
        width: Of a word over all encoders.
        samples: Whether pictures of the learned concept are drawn.
    """
    embeddings = Column("embeddings", "tensor", (max_words, width), doc="a row a token, zeros after the last")
    drawn = Column("samples", "image", doc="the concept on new subjects, a row a subject")
    return (*COLUMNS, embeddings, *([drawn] if samples else []))


def filled(
    prepared: Prepared,
    v_VE: torch.Tensor,
    curve: Sequence[Mapping[str, Any]],
    *,
    settings: LegoSettings,
    seed: int,
    stopped: str,
    seconds: float,
) -> Row:
    """What is known of a concept when it is finished.

    Args:
        prepared: The concept.
        v_VE: Its words' vectors, zeros after the last.
        curve: Step, losses and norms at the end of each window; at least one.
        settings, seed: It was learned with.
        stopped: Why it stopped.
        seconds: In its slot.
    """
    concept, last = prepared.concept, curve[-1]
    learned = settings.model_dump()
    around = learned.pop("templates", None)  # a concept's prompts are known by that name
    learned |= {} if around is None else {"prompt_templates": around}
    return {
        "name": concept.name,
        "phrase": concept.phrase,
        "tokens": json.dumps(list(prepared.tokens)),
        "words": json.dumps([*concept.words, *(subject.name for subject in concept.subjects)]),
        "embeddings": v_VE.detach().cpu().numpy().copy(),
        "norms": json.dumps(last["norms"]),
        "start_norms": json.dumps(prepared.start_VE.norm(dim=-1).tolist()),
        "loss": last["loss"],
        "context_loss": last["context"],
        "steps": last["step"],
        "stopped": stopped,
        "seconds": seconds,
        "curve": json.dumps(list(curve)),
        "pictures": len(prepared.with_I),
        "settings": json.dumps(learned | {"templates": concept.templates.model_dump(), "seed": seed}),
        "training": sheet(prepared.thumbnails, columns=min(8, len(prepared.thumbnails))),
    }
