"""The job `decode`: embeddings of any origin to pictures, several draws each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.kinds.decode import Decode
from jobs.run import run_job
from jobs.schema.reading import JobFileError, load
from stages.decode.stage import DecodeEmbeddings
from tests.support import tiny_kandinsky


def test_somebody_elses_embeddings_become_pictures(in_process: None, tmp_path: Path, prior: str) -> None:
    decoder = tiny_kandinsky.build_decoder(tmp_path / "decoder")
    vectors_NE = np.random.default_rng(0).normal(size=(3, tiny_kandinsky.WIDTH))
    vectors = [*vectors_NE.tolist(), [1.0] * 5]
    pq.write_table(pa.table({"name": ["a", "b", "c", "narrow"], "vector": vectors}), tmp_path / "in.parquet")
    source = {"path": str(tmp_path / "in.parquet"), "id": "name", "columns": {"embedding": "vector"}}
    job = {"job": "decode", "input": source, "encoder": prior, "decode": {"model": decoder, "steps": 2}, "draws": 2,
           "max_failed_fraction": 0.5, "shard_rows": 3}  # fmt: skip
    ended = run_job(job, output=str(tmp_path / "out"))
    assert ended.state == "complete"
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out" / "data").to_pylist()}
    assert sorted(rows) == sorted(f"{name}/{draw}" for name in ("a", "b", "c", "narrow") for draw in (0, 1))
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {"narrow/0", "narrow/1"}
    assert f"width 5, the decoder {decoder} takes {tiny_kandinsky.WIDTH}" in rows["narrow/0"]["error"]

    parsed = load(job)
    assert isinstance(parsed, Decode)
    stage = DecodeEmbeddings(DecodeEmbeddings.Settings(**parsed.stage().params), device="cpu")
    alone = [{"id": f"a/{draw}", "embedding": vectors_NE[0]} for draw in (0, 1)]
    first, second = (np.asarray(row["image"]).astype(int) for row in stage(alone))
    for wanted, draw in ((first, 0), (second, 1)):
        with Image.open(io.BytesIO(rows[f"a/{draw}"]["image"]["bytes"])) as picture:
            assert np.abs(np.asarray(picture).astype(int) - wanted).max() <= 1
    assert np.abs(first - second).max() > 1

    page = (tmp_path / "out" / "report.html").read_text()
    assert "One line an embedding." in page


def test_a_job_without_a_decoder_is_refused() -> None:
    with pytest.raises(JobFileError, match="decode"):
        load({"job": "decode", "input": "vectors.npy"})
