"""Which model says what a picture shows, and how it is asked. Plain models; nothing heavy is imported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.contract import Settings, renamed, speed
from stages.models.names import DeviceName, ModelName


class Captioning(Settings):
    """Captions by a frozen model."""

    model: ModelName
    """Folder or hub id of an image-text-to-text model of transformers: BLIP, Florence-2, or one that chats (LLaVA,
    Qwen2-VL, SmolVLM, ...)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    allow_pickle: bool | None = None
    """Read weights that are there as pickles (``.bin``) alone. A pickle can run anything on the machine that reads
    it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights; large models are made for ``bfloat16``."""
    device: DeviceName = speed("auto")
    """``cpu``, ``cuda``, ... ``auto`` takes the GPU where there is one."""
    question: str | None = Field(None, min_length=1)
    """What a model that chats is asked; Florence-2's task, such as ``<DETAILED_CAPTION>``; of BLIP the words that its
    caption goes on from. Left out: *Describe this picture in one sentence.*, ``<CAPTION>``, and nothing."""
    max_tokens: int = Field(64, ge=1)
    """A caption has no more; ``caption_truncated`` says whose would have gone on."""
    temperature: float | None = Field(None, gt=0)
    """Draw each token by its probability, sharpened by this, with numbers of the row's own. Left out: the likeliest
    token, always."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the likeliest tokens that have so much of the probability together."""
    batch_size: int | None = speed(None, ge=1, **renamed("batch", to="batch_size"))
    """Pictures at once. Left out: found from the device's memory."""

    @model_validator(mode="after")
    def _drawn(self) -> Captioning:
        if self.top_p is not None and self.temperature is None:
            raise ValueError("`top_p` says among which tokens one is drawn; set `temperature` too, 1.0 for instance")
        return self


class CaptionSettings(Captioning):
    """What the stage is told."""

    seed: int = 0
