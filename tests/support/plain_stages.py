"""Stages for tests of inputs, and a run of them without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.input.source import Source
from pipeline.output.verify import verify
from pipeline.run.draft import RunSpec
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


class Captioned:
    """A picture and its caption -> width of the one, the other as it came. Says which columns it takes."""

    @staticmethod
    def describe() -> StageInfo:
        columns = (Column("width", "int64"), Column("said", "string"), Column("names", "json"))
        return StageInfo(columns, reads={"image": "picture", "prompt": "text", "title": "text?"})

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            picture, names = row.get("image"), sorted(row.keys() - {"id"})
            said = row.get("prompt") or row.get("title")
            yield ok(row, width=None if picture is None else picture.width, said=said, names=names)


class Said(Captioned):
    """A caption -> itself; takes no pictures."""

    @staticmethod
    def describe() -> StageInfo:
        return replace(Captioned.describe(), reads={"prompt": "text", "title": "text?"})


def spec_of(
    path: Path | str, out: Path, keep: Iterable[str] = (), shard_rows: int = 10, stage: str = "Lengths", **source: Any
) -> RunSpec:
    described = StageSpec(f"tests.support.plain_stages:{stage}")
    return RunSpec(described, Source((str(path),), **source), str(out), keep=tuple(keep), shard_rows=shard_rows)


def rows_of(path: Path | str, out: Path, keep: Iterable[str] = (), **others: Any) -> list[dict[str, Any]]:
    """Every row of the input as it comes out, in order; the output verifies."""
    spec = spec_of(path, out, keep, **others)
    run_plain(spec)
    assert verify(spec.output).ok
    return data(spec.output).to_pylist()
