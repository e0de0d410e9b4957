"""Rows as tables."""

from __future__ import annotations

import pyarrow as pa

from pipeline.output.schema import table

VECTOR = pa.list_(pa.float16(), 2)
SCHEMA = pa.schema([("id", pa.string()), ("v", VECTOR), ("status", pa.string()), ("error", pa.string())])


def test_values_that_do_not_fit_fail_their_row_alone() -> None:
    values = [[1, 2], [1, 2, 3], [1, 1e6], None]
    rows = [{"id": str(i), "v": v, "status": "ok", "error": None} for i, v in enumerate(values)]
    stored = table(rows, SCHEMA).to_pylist()
    assert [row["status"] for row in stored] == ["ok", "failed", "failed", "ok"]
    assert stored[0]["v"] == [1, 2]
    assert "3 values, expected 2" in stored[1]["error"]
    assert "overflows" in stored[2]["error"]
