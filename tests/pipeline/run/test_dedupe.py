"""`dedupe: content`: what holds the same is processed once, and every row is there; against a plain loop."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.input.contents import Seen
from pipeline.output.dataset import Output
from pipeline.output.publish import card
from pipeline.output.verify import verify
from pipeline.run.plan import make_plan
from tests.support.plain_stages import rows_of, spec_of


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (shade + 1, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _outcome(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["id"], row["status"], row["duplicate_of"]


def _expected(contents: dict[str, bytes], broken: bytes) -> list[tuple[Any, ...]]:
    """What a loop over all rows in order finds."""
    first: dict[bytes, str] = {}
    found = []
    for own in sorted(contents):
        earlier = first.setdefault(contents[own], own)
        status = "failed" if contents[own] == broken else "ok"
        found.append((own, status, None) if earlier == own else (own, "duplicate", earlier))
    return found


@pytest.mark.parametrize("shard_rows", [1, 3, 100])
def test_pictures_of_a_folder_over_shards_and_links(tmp_path: Path, shard_rows: int) -> None:
    broken = b"\x89PNG no picture"
    shades = {"a/0.png": 1, "a/1.png": 2, "a/2.png": 1, "b/0.png": 3, "b/1.png": 2, "z.png": 1}
    contents = {name: _png(shade) for name, shade in shades.items()} | {"c/0.png": broken, "c/1.png": broken}
    for name, data in contents.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in/b/2.png").symlink_to("0.png")
    contents["b/2.png"] = contents["b/0.png"]
    rows = rows_of(
        tmp_path / "in", tmp_path / "out", stage="Captioned", shard_rows=shard_rows, dedupe="content", keep=["path"]
    )
    assert [_outcome(row) for row in rows] == _expected(contents, broken)
    assert [row["path"] for row in rows] == sorted(contents)
    for row in rows:
        assert (row["width"] is not None) == (row["status"] == "ok")
        assert (row["error"] is not None) == (row["status"] == "failed")
    report = verify(str(tmp_path / "out"))
    assert (report.rows_ok, report.rows_failed, report.rows_duplicate) == (3, 1, 5)


def test_plan_status_and_card_say_how_many_and_name_the_first(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, shade in {"a.png": 1, "b.png": 2, "c.png": 1}.items():
        (tmp_path / "in" / name).write_bytes(_png(shade))
    note = (
        "1 of 3 rows hold what an earlier row holds and are not processed again: they get the status `duplicate` "
        "(row 3 of the input holds what 'a.png' holds)"
    )
    spec = spec_of(tmp_path / "in", tmp_path / "out", stage="Captioned", dedupe="content")
    assert make_plan(spec).notes == (note,)
    rows_of(tmp_path / "in", tmp_path / "out", stage="Captioned", dedupe="content")
    output = Output.open(str(tmp_path / "out"))
    status = output.status()
    assert status.notes == (note,)
    assert (status.progress.rows_ok, status.progress.rows_duplicate, status.progress.rows_left) == (2, 1, 0)
    from pipeline.output.dataset import Tally

    tally = Tally()
    for record in output.records():
        tally.add(record)
    page = card(output, tally, "0", "title", "")
    assert "1 more are duplicates" in page
    assert "3 of the input holds what 'a.png' holds" in page


def test_a_picture_under_another_caption_is_another_row(tmp_path: Path) -> None:
    """What the job reads decides: captions where it reads them, and the variant; what it does not read says nothing."""
    (tmp_path / "in").mkdir()
    a, b = _png(1), _png(2)
    shared = {"image": [a, a, b, None], "prompt": ["x", "y", "x", None]}
    pq.write_table(pa.table({**shared, "note": ["1", "2", "3", "4"]}), tmp_path / "in/0.parquet")
    pq.write_table(pa.table({**shared, "note": ["5", "6", "7", "8"]}), tmp_path / "in/1.parquet")
    rows = rows_of(tmp_path / "in", tmp_path / "out", stage="Captioned", shard_rows=3, dedupe="content")
    twins = {row["id"]: row["duplicate_of"] for row in rows if row["status"] == "duplicate"}
    assert twins == {f"1.parquet#{i}": f"0.parquet#{i}" for i in range(3)}  # not the nulls
    texts = rows_of(tmp_path / "in", tmp_path / "texts", stage="Said", dedupe="content")
    assert [row["duplicate_of"] for row in texts] == [
        None, None, "0.parquet#0", None, "0.parquet#0", "0.parquet#1", "0.parquet#0", None,
    ]  # fmt: skip
    methods = {"method": ("p", "q")}
    rows = rows_of(tmp_path / "in", tmp_path / "v", stage="Said", shard_rows=3, dedupe="content", variants=methods)
    assert {row["id"]: row["duplicate_of"] for row in rows if row["status"] == "duplicate"} == {
        f"{own}/{method}": f"{first}/{method}" for method in "pq" for own, first in (
            ("0.parquet#2", "0.parquet#0"), ("1.parquet#0", "0.parquet#0"), ("1.parquet#1", "0.parquet#1"),
            ("1.parquet#2", "0.parquet#0"),
        )
    }  # fmt: skip


def test_a_job_that_does_not_say_what_it_reads_goes_by_pictures(tmp_path: Path) -> None:
    """The path and the caption of a copy differ; a missing picture is nobody's copy."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.png").write_bytes(_png(1))
        (tmp_path / f"in/{name}.txt").write_text(name)
    rows = rows_of(tmp_path / "in", tmp_path / "out", dedupe="content")
    assert [_outcome(row) for row in rows] == [("a.png", "ok", None), ("b.png", "duplicate", "a.png")]
    table = pa.table({"image": ["in/a.png", "in/gone.png", "in/b.png", "in/gone.png"]})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = rows_of(tmp_path / "t.parquet", tmp_path / "named", stage="Captioned", dedupe="content")
    assert [row["status"] for row in rows] == ["ok", "failed", "duplicate", "failed"]


def test_a_duplicate_stays_one_in_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["x", "y", "x"]}), tmp_path / "in/0.parquet")
    rows_of(tmp_path / "in", tmp_path / "first", keep=["prompt"], stage="Said", dedupe="content")
    for step, more in (("second", {}), ("mapped", {"columns": {"prompt": "said"}})):
        rows = rows_of(tmp_path / "first", tmp_path / step, stage="Said", **more)
        assert [_outcome(row) for row in rows] == [
            ("0.parquet#0", "ok", None), ("0.parquet#1", "ok", None), ("0.parquet#2", "duplicate", "0.parquet#0"),
        ]  # fmt: skip
    methods = {"method": ("p", "q")}
    rows = rows_of(tmp_path / "first", tmp_path / "third", stage="Said", variants=methods)
    assert [_outcome(row) for row in rows][-1] == ("0.parquet#2/q", "duplicate", "0.parquet#0/q")


def test_without_it_nothing_is_different(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["x", "x"], "duplicate_of": ["a", "b"]}), tmp_path / "in/0.parquet")
    rows = rows_of(tmp_path / "in", tmp_path / "out", stage="Said")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert "duplicate_of" not in rows[0]
    assert not (tmp_path / "out/_latentmill/duplicates.parquet").exists()
    assert "dedupe" not in Output.open(str(tmp_path / "out")).plan["source"]


@pytest.mark.parametrize("held", [150, 10_000])
def test_rows_beyond_memory_are_found_on_disk(held: int) -> None:
    chooses = np.random.default_rng(0)
    values = [os.urandom(16) for _ in range(300)]
    digests = [values[i] for i in chooses.integers(0, len(values), 1000)]
    ids = [f"{i} \n ä \ud800" if i % 3 else str(i) for i in range(len(digests))]
    seen, first = Seen(held), dict[bytes, str]()
    expected = []
    for row, (digest, own) in enumerate(zip(digests, ids, strict=True)):
        seen.add(digest, own)
        if first.setdefault(digest, own) != own:
            expected.append((row, first[digest]))
    assert list(seen.again()) == expected


@pytest.mark.parametrize("form", ["tar", "jsonl", "csv", "datasets"])
def test_every_format(tmp_path: Path, form: str) -> None:
    """The same three pictures under three captions, the first and the last alike in both."""
    rows = [(_png(1), "x"), (_png(2), "x"), (_png(1), "x")]
    folder = tmp_path / "in"
    folder.mkdir()
    if form == "tar":
        with tarfile.open(folder / "0.tar", "w") as file:
            for number, (data, said) in enumerate(rows):
                for suffix, content in (("png", data), ("json", json.dumps({"prompt": said}).encode())):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    elif form == "datasets":
        import datasets

        datasets.Dataset.from_list([{"image": data, "prompt": said} for data, said in rows]).save_to_disk(str(folder))
    else:
        told = [{"image": base64.b64encode(data).decode(), "prompt": said} for data, said in rows]
        lines = [json.dumps(row) for row in told]
        if form == "csv":
            lines = ["image,prompt", *(f"{row['image']},{row['prompt']}" for row in told)]
        (folder / f"0.{form}").write_text("\n".join(lines) + "\n")
    found = rows_of(folder, tmp_path / "out", stage="Captioned", dedupe="content")
    assert [row["status"] for row in found] == ["ok", "ok", "duplicate"]
    assert found[2]["duplicate_of"] == found[0]["id"]
