"""Damage within a file fails the rows that cannot be read, and no others; none is lost, and the run goes on."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.read import read_rows
from pipeline.input.rows import Span
from pipeline.input.source import Damaged, Source, SourceError
from pipeline.output.verify import verify
from tests.support.faulty import data, run_plain
from tests.support.plain_stages import spec_of

TEXTS = [f"{i:04d} " + np.random.default_rng(i).bytes(200).hex() for i in range(1000)]


def _parquet(path: Path, damaged: int | None, **options: Any) -> None:
    """1,000 rows in two groups, columns n, text; from this row of the first group on, a page of ``text`` is damaged."""
    table = pa.table({"n": [f"n{i}" for i in range(1000)], "text": TEXTS})
    pq.write_table(table, path, row_group_size=500, data_page_size=4096, write_batch_size=50, use_dictionary=False,
                   **options)  # fmt: skip
    if damaged is not None:
        content = bytearray(path.read_bytes())
        column = pq.ParquetFile(path).metadata.row_group(0).column(1)
        begin = column.data_page_offset + int(column.total_compressed_size * damaged / 500)
        content[begin : begin + 2000] = b"\xff" * 2000
        path.write_bytes(content)


@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_page_fails_its_rows(tmp_path: Path, compression: str, own_ids: bool) -> None:
    _parquet(tmp_path / "in.parquet", 300, compression=compression)
    ids = {"id": "n"} if own_ids else {}
    spec = spec_of(tmp_path / "in.parquet", tmp_path / "out", ["text"], shard_rows=130, columns={"text": "text"}, **ids)
    run_plain(spec)
    assert verify(spec.output).ok, verify(spec.output).problems
    rows = data(spec.output).to_pylist()
    assert [row["id"] for row in rows] == [f"n{i}" if own_ids else f"in.parquet#{i}" for i in range(1000)]
    bad = [place for place, row in enumerate(rows) if row["status"] == "failed"]
    assert 0 < len(bad) <= 300
    assert min(bad) > 200
    assert max(bad) < 500  # the second group is whole
    for place, row in enumerate(rows):
        if row["status"] == "ok":
            assert row["text"] == TEXTS[place]
        else:
            assert "of in.parquet cannot be read, the file is damaged there" in row["error"]


def test_a_checksum_finds_damage_that_still_reads(tmp_path: Path) -> None:
    """One letter for another: with the page checksums that many writers leave, it is no text of the row's."""
    _parquet(tmp_path / "in.parquet", None, compression="none", write_page_checksum=True)
    content = (tmp_path / "in.parquet").read_bytes()
    assert content.count(TEXTS[320].encode()) == 1
    (tmp_path / "in.parquet").write_bytes(content.replace(TEXTS[320].encode(), b"x" * len(TEXTS[320])))
    spec = spec_of(tmp_path / "in.parquet", tmp_path / "out", ["text"], shard_rows=250, columns={"text": "text"})
    run_plain(spec)
    rows = data(spec.output).to_pylist()
    assert rows[320]["status"] == "failed"
    assert [row["text"] for row in rows if row["status"] == "ok"] == [
        text for text, row in zip(TEXTS, rows, strict=True) if row["status"] == "ok"
    ]
    assert sum(row["status"] == "ok" for row in rows) >= 750


def test_damaged_ids_are_never_guessed(tmp_path: Path) -> None:
    _parquet(tmp_path / "in.parquet", 300, compression="snappy")
    source, span = Source((str(tmp_path / "in.parquet"),), "parquet", id="text"), Span("in", "", 0, 1000)
    with pytest.raises(Damaged, match=r"of in cannot be read.*nor can their ids"):
        list(read_rows(source, (replace(span, path=source.path[0]),), 0, 1000, {"n": "n"}))


@pytest.mark.parametrize("form", ["jsonl", "txt", "csv"])
def test_a_compressed_file_that_breaks_off_fails_what_follows(tmp_path: Path, form: str) -> None:
    """Planned whole, and damaged since in a way that no time stamp tells."""
    lines = [json.dumps({"text": text}) if form == "jsonl" else text for text in TEXTS]
    path = tmp_path / f"in.{form}.gz"
    whole = gzip.compress(("text\n" * (form == "csv") + "\n".join(lines) + "\n").encode())
    path.write_bytes(whole[: len(whole) * 6 // 10])
    source = Source((str(path),), {"txt": "text"}.get(form, form))  # type: ignore[arg-type]
    rows = list(read_rows(source, (Span("in", str(path), 100, 1000, ahead=100),), 0, 900, None))
    assert [row.id for row in rows] == [f"in#{i}" for i in range(100, 1000)]
    good = [row for row in rows if row.error is None]
    assert [row.values["text"] for row in good] == TEXTS[100 : 100 + len(good)]
    assert 300 < len(good) < 600
    assert f"rows {100 + len(good)} to 999 of in cannot be read" in str(rows[-1].error)


def test_arrays_that_end_early(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.arange(8000, dtype=np.float32).reshape(2000, 4))
    os.truncate(tmp_path / "in.npy", 128 + 1500 * 16)
    source = Source((str(tmp_path / "in.npy"),), "npy")
    rows = list(read_rows(source, (Span("in", source.path[0], 1000, 2000),), 0, 1000, None))
    assert [row.error is None for row in rows] == [False] * 1000  # read in blocks of 1,024
    assert rows[0].id == "in#1000"


def test_a_file_that_is_gone_is_told_as_such(tmp_path: Path) -> None:
    source = Source((str(tmp_path / "in.txt"),), "text")
    with pytest.raises(SourceError, match=r"in\.txt: is gone; the input changed"):
        list(read_rows(source, (Span("in.txt", source.path[0], 0, 1),), 0, 1, None))
