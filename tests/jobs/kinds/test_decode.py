"""The job `decode`: embeddings of any origin to pictures, several draws each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.kinds.decode import Decode, _adapter
from jobs.run import run_job
from jobs.schema.reading import JobFileError, load
from stages.decode.stage import DecodeEmbeddings
from stages.engine.randomness import row_generator
from tests.support import tiny_decoders, tiny_kandinsky, tiny_stable_diffusion
from tests.support.looked_through import look_through


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
    look_through(tmp_path / "out")


def test_a_numpy_file_through_an_adapter_and_the_lines_of_its_card(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a `.npy` are numbered. The card's lines draw what the job drew, from the same noise."""
    model = tiny_stable_diffusion.build(tmp_path / "sd")
    adapter = tiny_decoders.build_ip_adapter(tmp_path / "adapter.safetensors", model)
    vectors_NE = np.random.default_rng(0).normal(size=(3, tiny_decoders.WIDTH)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors_NE)
    decode = {"model": model, "ip_adapter": {"path": adapter, "scale": 0.7}, "steps": 2, "size": 16}
    job = {"job": "decode", "input": str(tmp_path / "vectors.npy"), "keep": ["embedding"], "decode": decode}
    run_job(job, output=str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["id"] for row in rows] == [f"vectors.npy#{n}" for n in range(3)]
    assert all(row["status"] == "ok" for row in rows)
    np.testing.assert_array_equal(np.asarray([row["embedding"] for row in rows], np.float32), vectors_NE)
    blocks = (tmp_path / "out/README.md").read_text().split("```python\n")
    code = next(block.split("```")[0] for block in blocks if "load_ip_adapter" in block)
    code = code.replace('pipe("",', 'pipe("", generator=noise,')
    monkeypatch.chdir(tmp_path)
    exec(code, {"noise": row_generator(0, rows[0]["id"], "decode")})
    with Image.open("drawn.png") as drawn, Image.open(io.BytesIO(rows[0]["image"]["bytes"])) as picture:
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(picture).astype(int)).max() <= 1


def test_the_card_of_an_adapter_on_the_hub_names_its_parts() -> None:
    found = _adapter("h94/IP-Adapter/models/ip-adapter_sd15.safetensors")
    assert found == "'h94/IP-Adapter', subfolder='models', weight_name='ip-adapter_sd15.safetensors'"


def test_a_job_without_a_decoder_is_refused() -> None:
    with pytest.raises(JobFileError, match="decode"):
        load({"job": "decode", "input": "vectors.npy"})
