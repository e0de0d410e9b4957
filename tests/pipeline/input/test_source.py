"""Every format gives the same rows, with ids that stay, however it is cut; bad inputs are named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.files import list_files, resolve
from pipeline.input.ids import Uniqueness
from pipeline.input.read import read_rows, wanted_columns
from pipeline.input.rows import Span
from pipeline.input.source import Source, SourceError
from pipeline.run.survey import Survey, survey

TEXTS = [f'text {i}, "quoted"\nand {"é" * (i % 5)} a second line' for i in range(47)]


def _rows(source: Source, every: int = 10, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """All rows as shards of ``every`` rows give them."""
    source = resolve(source)
    shards = list(survey(source, every, limit, Survey(), lambda file, scan: None))
    assert [shard.rows for shard in shards[:-1]] == [every] * (len(shards) - 1)
    wanted = wanted_columns(source, ())
    return [(raw.id, raw.values) for shard in shards for raw in read_rows(source, shard.spans, 0, shard.rows, wanted)]


def _parquet(folder: Path) -> Source:
    half = [{"t": text, "n": i} for i, text in enumerate(TEXTS)]
    pq.write_table(pa.Table.from_pylist(half[:20]), folder / "a.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(half[20:]), folder / "b.parquet", row_group_size=100)
    return Source((str(folder / "*.parquet"),), columns={"text": "t"})


def _jsonl(folder: Path) -> Source:
    lines = [json.dumps({"t": text, "n": i}) for i, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n\n".join(lines[:20]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as handle:
        handle.write("\n".join(lines[20:]) + "\n\n")
    return Source((str(folder),), columns={"text": "t"})


def _csv(folder: Path) -> Source:
    with open(folder / "a.csv", "w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.writer(handle, delimiter=";")
        writer.writerow(["n", "t"])
        writer.writerows([i, text] for i, text in enumerate(TEXTS))
    return Source((str(folder / "a.csv"),), columns={"text": "t"})


def _webdataset(folder: Path) -> Source:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, text in enumerate(TEXTS):
            for extension, content in (("json", json.dumps({"t": text}).encode()), ("cls", b"3")):
                info = tarfile.TarInfo(f"{'é' * 60}{i:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return Source((str(folder),), columns={"text": "t"})


def _datasets(folder: Path) -> Source:
    import datasets

    datasets.Dataset.from_dict({"t": TEXTS}).save_to_disk(folder / "d", num_shards=2)
    return Source((str(folder / "d"),), columns={"text": "t"})


@pytest.mark.parametrize("write", [_parquet, _jsonl, _csv, _webdataset, _datasets])
def test_formats_agree_however_they_are_cut(tmp_path: Path, write: Callable[[Path], Source]) -> None:
    source = write(tmp_path)
    whole = _rows(source, 1000)
    assert [values["text"] for _, values in whole] == TEXTS
    assert len({own for own, _ in whole}) == len(TEXTS)
    for every in (1, 7, 20):
        assert _rows(source, every) == whole
    assert _rows(source, 7, limit=23) == whole[:23]


@pytest.mark.parametrize("variants", [{}, {"method": ("one", "two", "three")}])
@pytest.mark.parametrize("write", [_parquet, _jsonl, _csv, _webdataset, _datasets])
def test_a_shard_can_be_entered_at_any_row(
    tmp_path: Path, write: Callable[[Path], Source], variants: dict[str, tuple[str, ...]]
) -> None:
    """As when a shard that kills its workers is tried in halves, or a search shows a row of the input again."""
    source = resolve(replace(write(tmp_path), variants=variants))
    wanted = wanted_columns(source, ())
    for shard in survey(source, 11, None, Survey(), lambda file, scan: None):
        whole = list(read_rows(source, shard.spans, 0, shard.rows, wanted))
        assert len(whole) == shard.rows
        for skip in range(shard.rows):
            assert list(read_rows(source, shard.spans, skip, 4, wanted)) == whole[skip : skip + 4]


def test_entering_late_reads_no_earlier_rows(tmp_path: Path) -> None:
    """A row that cannot even be parsed is passed over unread."""
    (tmp_path / "a.jsonl").write_text('{"k": 1, "t": "a"}\n{broken\n{"k": 3, "t": "c"}\n')
    source = Source((str(tmp_path / "a.jsonl"),), format="jsonl", columns={"text": "t"}, id="k")
    span = Span("a.jsonl", str(tmp_path / "a.jsonl"), 0, 3)
    assert [raw.id for raw in read_rows(source, (span,), 2, 1, {"text": "t"})] == ["3"]
    with pytest.raises(SourceError, match="row 1 of"):
        list(read_rows(source, (span,), 0, 3, {"text": "t"}))


def test_arrays_come_as_numpy(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 2, 4)).astype(np.float32)
    np.save(tmp_path / "e.npy", vectors)
    got = _rows(Source((str(tmp_path / "e.npy"),)), 7)
    assert np.array_equal(np.stack([values["embedding"] for _, values in got]), vectors)
    flat = pa.array(vectors.reshape(-1))
    fixed = pa.FixedSizeListArray.from_arrays(flat, 8)
    shaped = pa.field("z", fixed.type, metadata={"shape": "[2, 4]"})
    ragged = pa.array([list(range(i % 4)) if i % 5 else None for i in range(30)], pa.list_(pa.float64()))
    table = pa.Table.from_arrays([fixed, ragged], schema=pa.schema([shaped, pa.field("r", ragged.type)]))
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=11)
    got = _rows(Source((str(tmp_path / "e.parquet"),)), 4)
    assert np.array_equal(np.stack([values["z"] for _, values in got]), vectors)
    assert got[5][1]["r"] is None
    assert got[7][1]["r"].tolist() == [0, 1, 2]


def test_ids_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    ids = []
    for place in ("here", "there/deep"):
        folder = tmp_path / place / "in"
        (folder / "sub").mkdir(parents=True)
        (folder / "b.txt").write_text("1\n2\n")
        (folder / "sub/a.txt").write_text("3\n")
        ids.append([own for own, _ in _rows(Source((str(folder),)))])
    assert ids[0] == ids[1] == ["b.txt#0", "b.txt#1", "sub/a.txt#0"]


def test_duplicate_ids_are_named(tmp_path: Path) -> None:
    rows = [{"k": f"key{i}", "t": "x"} for i in range(30)] + [{"k": "key7", "t": "y"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = Source((str(tmp_path / "a.parquet"),), columns={"text": "t"}, id="k")
    with pytest.raises(SourceError, match=r"'key7': row 7 of .*a\.parquet and row 30 of"):
        _rows(source)
    assert [own for own, _ in _rows(source, limit=30)] == [row["k"] for row in rows[:30]]
    (tmp_path / "p.txt").write_text("1\n")
    with pytest.raises(SourceError, match="name every file once"):
        _rows(Source((str(tmp_path / "p.txt"), str(tmp_path / "*.txt"))))


def test_uniqueness_spills_and_still_finds_every_repetition() -> None:
    unique = Uniqueness(held=1000)
    names = [f"id{i}" for i in range(20_000)] + ["id5", "id19999"]
    for start in range(0, len(names), 300):
        unique.add(names[start : start + 300])
    expected = {int(h) for h in Uniqueness.hashes(["id5", "id19999"], 2)}
    assert unique.suspects() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 is not enough", "no readable Parquet"),
        ("a.jsonl", b'[{"a": 1}]', "JSON array"),
        ("a.txt", "x\n".encode("utf-16"), "UTF-16"),
        ("a.tar", b"\1" * 2000, "tar"),
        ("a.npy", b"\x93NUMPY", "npy"),
        ("a.txt", b"", "no rows"),
        ("a.xyz", b"1", "does not tell the format"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        _rows(Source((str(tmp_path / name),)))
    assert name in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        resolve(Source((str(tmp_path / "none.txt"),)))
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match="jsonl and text"):
        resolve(Source((str(tmp_path),)))
    (tmp_path / "odd[1].txt").write_text("x\n")
    found = list(list_files(resolve(Source((str(tmp_path / "odd[1].txt"),)))))
    assert [file.name for file in found] == ["odd[1].txt"]


def test_source_travels_as_json_without_its_secrets() -> None:
    source = Source(("s3://bucket/*.parquet",), "parquet", {"text": "t"}, storage_options={"secret": "hush"})
    plain = json.loads(json.dumps(source.to_json()))
    assert "hush" not in json.dumps(plain)
    assert Source.from_json(plain) == replace(source, storage_options={})
