"""Stages that take rows in batches fill them over the borders of shards; each shard is what it is by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index import gaussian
from jobs.jobfile import load
from jobs.schema.base import RowJob
from pipeline.output.commit import read_summary
from pipeline.run.draft import RunSpec
from tests.support import tiny_captioners, tiny_kandinsky
from tests.support.in_hand import Planned

ROWS, SHARD, BATCH = 20, 5, 4


def told(kind: str, folder: Path) -> tuple[dict[str, Any], str, str]:
    """A job on `ROWS` rows; the stage's function that is called once a batch; the column that it makes."""
    if kind == "decode":
        decoder = tiny_kandinsky.build_decoder(folder / "decoder")
        embeddings = np.random.default_rng(0).normal(size=(ROWS, 24)).astype(np.float32)
        pq.write_table(pa.table({"embedding": list(embeddings)}), folder / "in.parquet")
        decode = {"model": decoder, "steps": 2, "batch_size": BATCH, "guidance": 1.0}
        return {"job": "decode", "input": str(folder / "in.parquet"), "decode": decode}, "_drawn", "image"
    pictures = {"path": f"micro-world://heldout?rows={ROWS}", "columns": {"image": "image", "prompt": "caption"}}
    if kind == "caption":
        model = tiny_captioners.build_llava(folder / "captioner")
        job = {"job": "caption", "model": model, "question": "What?", "max_tokens": 4, "batch_size": BATCH}
        return {**job, "input": pictures, "device": "cpu"}, "_captioned", "caption"
    prior = tiny_kandinsky.build_prior(folder / "prior")
    job = {"job": "reference", "encoder": prior, "batch_size": BATCH, "captions": True}
    return {**job, "input": pictures}, "_encode", "embedding"


@pytest.mark.parametrize("kind", ["decode", "caption", "reference"])
def test_batches_are_full_over_the_borders_of_shards(kind: str, tmp_path: Path) -> None:
    params, called, column = told(kind, tmp_path)
    job = load(params)
    assert isinstance(job, RowJob)
    found, sizes = [], []
    for name, apart in (("alone", True), ("joined", False)):
        spec = RunSpec(job.stage(), job.source(), str(tmp_path / name), shard_rows=SHARD)
        planned, seen = Planned(spec, apart=apart), list[int]()
        stage: Any = planned.worker.stage
        work = getattr(stage, called)
        setattr(stage, called, lambda rows, work=work, seen=seen: (seen.append(len(rows)), work(rows))[1])
        done = planned.all()
        tables = [planned.table(record).to_pylist() for record in done]
        assert [len(rows) for rows in tables] == [SHARD] * (ROWS // SHARD)
        found.append(tables)
        sizes.append(seen)
        if kind == "reference":
            for record, rows in zip(done, tables, strict=True):
                arrays = read_summary(planned.output.folder, record.summary[0])  # type: ignore[union-attr]
                moments = gaussian.Moments.from_arrays(arrays)
                assert moments.rows == arrays["pairs.scalars"][0] == SHARD
                wanted = np.array([row["embedding"] for row in rows], np.float64).mean(0)
                assert np.allclose(moments.mean_E, wanted, rtol=1e-12)
    assert sizes == [[4, 1] * 4, [4] * 5]
    texts = [[row.pop("text_embedding", None) for rows in tables for row in rows] for tables in found]
    assert found[0] == found[1]
    if kind == "reference":  # captions are padded to the longest beside them, which rounds otherwise
        assert np.allclose(*texts, rtol=1e-5, atol=1e-5)
    assert sum(row[column] is not None for rows in found[0] for row in rows) > ROWS / 2
