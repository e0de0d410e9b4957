"""The plan: shards from a stream, a fingerprint that moves with everything that changes the bytes, clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.input.source import SourceError
from pipeline.output.planfile import read_shards
from pipeline.run.draft import PlanError, draft
from pipeline.run.plan import PlanMismatch, make_plan, write_plan
from pipeline.storage import Folder
from tests.support.faulty import spec_for

LINES = [f"line {i}" for i in range(25)]


def test_shards_cover_every_row_once_and_come_back_from_disk(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, LINES, shard_rows=10)
    plan = make_plan(spec)
    assert (plan.rows, plan.shards, plan.files, plan.format) == (25, 3, 1, "text")
    assert plan.columns == ("id", "text", "length", "vector", "upper", "status", "error")
    assert not (tmp_path / "out").exists()
    folder = Folder.at(str(tmp_path / "own"))
    stored = write_plan(spec, draft(spec), folder, 0.0)
    assert stored["fingerprint"] == plan.fingerprint
    spans = [(s.start, s.stop) for shard in read_shards(folder) for s in shard.spans]
    assert spans == [(0, 10), (10, 20), (20, 25)]


def test_fingerprint_moves_with_what_changes_the_bytes_only(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, LINES)
    first = make_plan(spec).fingerprint
    same = [replace(spec, output=str(tmp_path / "elsewhere")), replace(spec, storage_options={"auto_mkdir": True})]
    assert {make_plan(other).fingerprint for other in same} == {first}
    changed = [
        replace(spec, seed=1), replace(spec, config={"a": 1}), replace(spec, shard_rows=3), replace(spec, limit=9),
        replace(spec, stage=replace(spec.stage, params={**spec.stage.params, "delay": 0.5})), replace(spec, keep=()),
    ]  # fmt: skip
    found = {make_plan(other).fingerprint for other in changed}
    assert len(found) == len(changed)
    assert first not in found


def test_columns_that_are_missing_or_clash_are_named(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, LINES)
    with pytest.raises(SourceError, match="did you mean 'text'"):
        make_plan(replace(spec, source=replace(spec.source, columns={"text": "txet"}), keep=()))
    clash = replace(spec.source, columns={"text": "text", "upper": "text"})
    with pytest.raises(PlanError, match="two output columns are called 'upper'"):
        make_plan(replace(spec, source=clash, keep=("upper",)))
    with pytest.raises(PlanError, match="shard_rows"):
        make_plan(replace(spec, shard_rows=0))


def test_a_mismatch_is_told_by_what_differs() -> None:
    """Of lists not the whole of both; and a file of the same size is not said to differ from itself."""
    fields = {
        "output columns": (["id: string", "a: int64", "b: float"], ["id: string", "a: float", "b: float"]),
        "config.steps": (4, 8),
        "input file 0.png": ("1 rows, 696 bytes", "1 rows, 696 bytes"),
        "order": (["a", "b"], ["b", "a"]),
    }
    assert str(PlanMismatch("out", fields)).splitlines()[1:-1] == [
        "  output columns: was ['a: int64'], is ['a: float']",
        "  config.steps: was 4, is 8",
        "  input file 0.png: has been written anew since then (1 rows, 696 bytes)",
        "  order: was ['a', 'b'], is ['b', 'a']",
    ]
    lbo = {"method": "lbo", "passes": 10, "ilb": {"iterations": 50}}
    more = {**lbo, "passes": 30, "ilb": {"iterations": 20}}
    euler = {"method": "euler"}
    for was, now, lines in (
        ([euler, lbo], [euler, more], ["[1].passes: was 10, is 30", "[1].ilb.iterations: was 50, is 20"]),
        ([euler], [euler, lbo], [f": was [{euler}], is [{euler}, {lbo}]"]),
        ([lbo], [euler], [f": was [{lbo}], is [{euler}]"]),
    ):
        told = str(PlanMismatch("out", {"config.methods": (was, now)}))
        assert told.splitlines()[1:-1] == [f"  config.methods{line}" for line in lines]
    told = str(PlanMismatch("out", {"config.decode.batch": (4, 8)}, {"decode.batch": "decode.batch_size"}))
    assert told.splitlines()[1] == "  config.decode.batch_size: was 4, is 8"
