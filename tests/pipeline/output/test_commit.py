"""Commit without Ray: the first record stands, an attempt that is cut is noticed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.output import commit, parquet
from pipeline.output.commit import Attempt, Record, check_attempt, write_record
from pipeline.output.planfile import PLAN
from pipeline.output.schema import encode_schema, table
from pipeline.storage import Folder

VECTOR = pa.list_(pa.float16(), 2)
SCHEMA = pa.schema([("id", pa.string()), ("v", VECTOR), ("status", pa.string()), ("error", pa.string())])


def _record(shard: int, token: str) -> Record:
    return Record(shard, token, f"{token}.parquet", 1, "", 1, 0, 0.0, 0.0, "here")


def test_first_record_stands(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    folder.write(PLAN, json.dumps({"schema": encode_schema(SCHEMA)}).encode())
    assert write_record(folder, _record(3, "a")).attempt == "a"
    assert write_record(folder, _record(3, "b")).attempt == "a"
    assert [p.name for p in (tmp_path / commit.RECORDS).iterdir()] == ["000003.json"]


def test_a_cut_attempt_is_noticed(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    attempt = Attempt(folder, f"{commit.ATTEMPTS}/x.parquet", SCHEMA)
    attempt.add(table([{"id": "a", "v": np.ones(2), "status": "ok", "error": None}], SCHEMA))
    size, _ = attempt.close()
    check_attempt(folder, f"{commit.ATTEMPTS}/x.parquet", size, 1)
    path = tmp_path / commit.ATTEMPTS / "x.parquet"
    for content in (path.read_bytes()[:-9], path.read_bytes()[:-9] + b"x" * 9):
        path.write_bytes(content)
        with pytest.raises(commit.CommitError):
            check_attempt(folder, f"{commit.ATTEMPTS}/x.parquet", size, 1)


def test_rows_are_told_by_the_end_of_a_file() -> None:
    """A footer that is longer than what was fetched is fetched by itself."""
    sink = io.BytesIO()
    pq.write_table(pa.table({f"column {i}": [1, 2, 3] for i in range(50)}), sink)
    content = sink.getvalue()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    assert parquet.rows(content[-footer:]) == parquet.rows(content) == 3
    assert parquet.rows(content[-footer + 1 :]) is None
    with pytest.raises(pa.ArrowInvalid):
        parquet.rows(content[-footer:-4] + b"none")
