"""A small job with a small stage, for tests of what surrounds every job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from jobs.page import charts
from jobs.schema import registry
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from jobs.schema.steps import step_model
from pipeline.contract import Column, Row, StageInfo, StageSpec, failed, ok


class Toy(RowJob):
    """Rewrites texts and measures them."""

    job: Literal["toy"] = "toy"
    mode: Literal["upper", "lower"] = "upper"
    """What becomes of the letters."""
    factor: float = 1.0
    """Multiplies the length."""

    def stage(self) -> StageSpec:
        return StageSpec("tests.support.toy_job:Letters", {"mode": self.mode, "factor": self.factor})

    def panels(self) -> list[Panel]:
        return [Panel("Lengths", lambda view: charts.histogram(view.values("length"), "length of the text"))]


class Letters:
    """Texts in upper or lower case, their length, and pictures in grey. A text with ``fail`` in it fails."""

    known_as = "tests.toy_job:Letters"  # it has lain elsewhere, as the stages of old outputs have

    def __init__(self, mode: str, factor: float) -> None:
        self.mode, self.factor = mode, factor

    @staticmethod
    def describe(mode: str, factor: float) -> StageInfo:
        columns = (
            Column("changed", "string", doc="The text in other letters."),
            Column("length", "float64", doc="Characters, times the factor."),
            Column("vector", "tensor", (2, 2), doc="The length, four times."),
            Column("grey", "image", doc="The picture without its colours."),
        )
        return StageInfo(columns, metadata={"mode": mode})

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        import numpy as np

        for row in rows:
            text = str(row.get("text") or "")
            if "fail" in text:
                yield failed(row, f"refused: {text}")
                continue
            length = len(text) * self.factor
            image: Any = row.get("image")
            yield ok(
                row,
                changed=text.upper() if self.mode == "upper" else text.lower(),
                length=length,
                vector=np.full((2, 2), length, dtype=np.float32),
                grey=None if image is None else image.convert("L").convert("RGB"),
            )


@contextmanager
def known() -> Iterator[None]:
    """The kind ``toy`` is registered while it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.KINDS, "toy", "tests.support.toy_job:Toy")
        step_model.cache_clear()
        yield
    step_model.cache_clear()
