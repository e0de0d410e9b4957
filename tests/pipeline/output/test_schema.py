"""Rows as tables."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from pipeline.contract import Column
from pipeline.output.schema import output_schema, table

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


def test_tensors_whose_shape_is_the_row_s_own_are_lists() -> None:
    columns = [Column("latent", "tensor", (2, -1, -1), "float16")]
    schema = output_schema([], columns, {})
    assert schema.field("latent").type == pa.list_(pa.float16())
    assert json.loads(schema.field("latent").metadata[b"shape"]) == [2, -1, -1]
    small, large = np.arange(4.0).reshape(2, 1, 2), np.arange(12.0).reshape(2, 3, 2)
    rows = [
        {"id": "a", "status": "ok", "latent": small},
        {"id": "b", "status": "failed", "error": "no"},
        {"id": "c", "status": "ok", "latent": large},
        {"id": "d", "status": "ok", "latent": small * 1e6},
    ]
    made = table(rows, schema).to_pylist()
    assert [row["latent"] for row in made] == [list(small.ravel()), None, list(large.ravel()), None]
    assert "overflows" in made[3]["error"]
