"""A stage for tests of inputs, and a run of it without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.input.source import Source
from pipeline.output.dataset import verify
from pipeline.run.plan import RunSpec
from tests.support.faulty import data, run_plain


class Lengths:
    """Text -> its length; null where there is none."""

    @staticmethod
    def describe() -> StageInfo:
        return StageInfo((Column("length", "int64"),))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            text = row.get("text")
            yield ok(row, length=None if text is None else len(text))


def spec_of(path: Path | str, out: Path, keep: Iterable[str] = (), shard_rows: int = 10, **source: Any) -> RunSpec:
    stage = StageSpec("tests.support.lengths:Lengths")
    return RunSpec(stage, Source((str(path),), **source), str(out), keep=tuple(keep), shard_rows=shard_rows)


def rows_of(path: Path | str, out: Path, keep: Iterable[str] = (), **source: Any) -> list[dict[str, Any]]:
    """Every row of the input as it comes out, in order; the output verifies."""
    spec = spec_of(path, out, keep, **source)
    run_plain(spec)
    assert verify(spec.output).ok
    return data(spec.output).to_pylist()
