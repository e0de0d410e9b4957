"""What a cell is taken for: text and pictures come in many forms, and nothing else is turned into either."""

from __future__ import annotations

import base64
import csv
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

from pipeline.input.forms import FormError, as_picture, as_text
from pipeline.input.source import SourceError
from pipeline.run.plan import make_plan
from tests.support.plain_stages import rows_of, spec_of


def _picture(width: int = 6, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 4), (200, 30, 30)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), ("", ""), (None, None), (float("nan"), None), (np.float32("nan"), None), (b"a star", "a star"),
     ("日本".encode(), "日本")],
)  # fmt: skip
def test_what_counts_as_text(value: Any, text: str | None) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["a red star", "one star"], "a list of 2"),
        (np.array([1.0, 2.0, 3.0]), "a list of 3"),
        ({"en": "a red star"}, "an object with the keys en"),
        (3, "the number 3"),
        (1.5, "the number 1.5"),
        (True, "the truth value True"),
        (b"\xff\xd8\xff", "3 bytes that are no UTF-8"),
    ],
)
def test_what_does_not_count_as_text(value: Any, said: str) -> None:
    with pytest.raises(FormError, match=said):
        as_text(value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_base64_is_read_as_the_picture_it_is(form: str) -> None:
    data = _picture(64, form)
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    for written in (text, lines, f"data:image/{form.lower()};base64,{text}"):
        assert as_picture(written).data == data


@pytest.mark.parametrize("path", ["a.png", "/data/" + "a" * 90, "s3://bucket/a.png", "a" * 100, "9j/4AAQ" * 20])
def test_a_path_stays_a_path(path: str) -> None:
    assert (as_picture(path).data, as_picture(path).path) == (None, path)


CAPTIONS: list[tuple[pa.Array, list[tuple[str, str | None]]]] = [
    (pa.array([["a red star", "one star"], None]), [("failed", "list of 2"), ("ok", None)]),
    (pa.array([float("nan"), 1.0]), [("ok", None), ("failed", "number 1.0")]),
    (pa.array([b"a red star", b"\xff"]), [("ok", "a red star"), ("failed", "no UTF-8")]),
    (pa.array([{"en": "a red star"}, None]), [("failed", "keys en"), ("ok", None)]),
    (pa.array([7, None]), [("failed", "number 7"), ("ok", None)]),
    (pa.array(["x", None]).dictionary_encode(), [("ok", "x"), ("ok", None)]),
    (pa.array(["x", None], pa.large_string()), [("ok", "x"), ("ok", None)]),
]


@pytest.mark.parametrize(("column", "expected"), CAPTIONS)
def test_a_caption_that_is_no_text_fails_its_row(
    tmp_path: Path, column: pa.Array, expected: list[tuple[str, str | None]]
) -> None:
    pq.write_table(pa.table({"image": [_picture(), _picture()], "caption": column}), tmp_path / "in.parquet")
    columns = {"image": "image", "prompt": "caption"}
    rows = rows_of(tmp_path / "in.parquet", tmp_path / "out", stage="Captioned", columns=columns)
    for row, (status, said) in zip(rows, expected, strict=True):
        assert row["status"] == status
        if status == "ok":
            assert (row["said"], row["width"]) == (said, 6)
        else:
            assert row["error"].startswith("prompt: holds")
            assert str(said) in row["error"]


def test_json_captions_that_are_no_text_fail_their_rows(tmp_path: Path) -> None:
    lines = [{"prompt": ["a", "b"]}, {"prompt": {"en": "a"}}, {"prompt": 5}, {"prompt": None}, {"prompt": "a"}, {}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", stage="Captioned")
    assert [row["status"] for row in rows] == ["failed"] * 3 + ["ok"] * 3
    assert [row["said"] for row in rows[3:]] == [None, "a", None]


def test_one_of_several_texts_may_be_something_else(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "title": ["x"]}\n{"title": "b"}\n{"title": 4}\n')
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", stage="Captioned")
    assert [(row["status"], row["said"]) for row in rows] == [("ok", "a"), ("ok", "b"), ("ok", None)]


def test_a_binary_column_that_the_stage_takes_as_pictures_is_decoded(tmp_path: Path) -> None:
    """As img2dataset writes Parquet: no struct, no metadata, nothing named under `images`."""
    table = pa.table({"key": ["0", "1"], "jpg": [_picture(5, "JPEG"), b"<html>"], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "in.parquet")
    columns = {"image": "jpg", "prompt": "caption"}
    rows = rows_of(tmp_path / "in.parquet", tmp_path / "out", ["image"], stage="Captioned", columns=columns)
    assert [(row["status"], row["width"]) for row in rows] == [("ok", 5), ("failed", None)]
    assert "not a picture" in rows[1]["error"]
    assert rows[0]["image"] == _picture(5, "JPEG")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_pictures_by_path_or_in_base64(tmp_path: Path, form: str) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.png").write_bytes(_picture(3))
    values = ["pics/a.png", base64.b64encode(_picture(7)).decode(), "pics/none.png", "x" * 300_000]
    path = tmp_path / f"in.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"image": values}), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"image": value}) + "\n" for value in values))
    else:
        with open(path, "w", newline="") as handle:
            csv.writer(handle).writerows([["image", "n"], *([value, 1] for value in values)])
    rows = rows_of(path, tmp_path / "out", stage="Captioned")
    assert [row["width"] for row in rows] == [3, 7, None, None]
    assert "none.png: No such file" in rows[2]["error"]
    assert len(rows[3]["error"]) < 300


def test_base64_that_is_no_picture_has_a_short_reason(tmp_path: Path) -> None:
    noise = base64.b64encode(os.urandom(300_000)).decode()
    lines = [noise, f"data:image/png;base64,{noise}", "data:image/png;base64,***", "/9j/" + noise[:-1], ["a"], 5, "\0"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"image": line}) + "\n" for line in lines))
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", stage="Captioned", images=("image",))
    assert {row["status"] for row in rows} == {"failed"}
    assert max(len(row["error"]) for row in rows) < 600
    assert "a list of 1, no picture" in rows[4]["error"]


def test_pictures_that_the_stage_does_not_take_are_left_alone(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    preview = pa.array([{"bytes": b"<html>", "path": None}, None], kind)
    pq.write_table(pa.table({"prompt": ["a", "b"], "preview": preview}), tmp_path / "in.parquet")
    rows = rows_of(tmp_path / "in.parquet", tmp_path / "out", stage="Said")
    assert [(row["status"], row["said"], row["names"]) for row in rows] == [
        ("ok", "a", '["prompt"]'), ("ok", "b", '["prompt"]')
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "tar"])
@pytest.mark.parametrize("stage", ["Said", "Lengths"])
def test_somebody_elses_status_says_nothing_of_this_run(tmp_path: Path, form: str, stage: str) -> None:
    table = [
        {"prompt": "a", "status": "done", "error": ""},
        {"prompt": "b", "status": "failed", "error": "upload timed out"},
    ]
    path = tmp_path / f"in.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif form == "csv":
        with open(path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(table):
                data = json.dumps(row).encode()
                info = tarfile.TarInfo(f"{number}.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = rows_of(path, tmp_path / "out", ["prompt"], stage=stage)
    assert [(row["status"], row["error"]) for row in rows] == [("ok", None), ("ok", None)]


def test_a_row_that_failed_in_the_step_before_still_fails(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n')
    rows_of(tmp_path / "in.jsonl", tmp_path / "first", ["prompt"], stage="Said")
    rows = rows_of(tmp_path / "first", tmp_path / "second", stage="Said")
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert rows[1]["error"].startswith("failed in the step before: prompt: holds the number 5")


def test_a_name_that_stands_twice_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt,score,prompt\na red star,1,a blue circle\n")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["prompt", "prompt", "score"])
    pq.write_table(twice, tmp_path / "in.parquet")
    asked: list[dict[str, Any]] = [
        {"columns": {"prompt": "prompt"}}, {}, {"id": "prompt"}, {"columns": {"title": "score"}, "keep": ["prompt"]},
    ]  # fmt: skip
    for name in ("in.csv", "in.parquet"):
        for others in asked:
            with pytest.raises(SourceError, match=rf"{name} has the column 'prompt' twice"):
                make_plan(spec_of(tmp_path / name, tmp_path / "out", stage="Said", **others))
        columns = {"title": "score"}
        rows = rows_of(tmp_path / name, tmp_path / f"{name}-out", ["score"], stage="Said", columns=columns)
        assert [row["status"] for row in rows] == ["ok"]


def test_captions_that_nobody_asks_for_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / f"in/{number}.png").write_bytes(_picture())
        (tmp_path / f"in/{number}.txt").write_text("a red star")
    (note,) = make_plan(spec_of(tmp_path / "in", tmp_path / "out", stage="Captioned")).notes
    assert "'text' are not used" in note
    assert "columns: {image: image, prompt: text}" in note
    mapped = spec_of(tmp_path / "in", tmp_path / "out", stage="Captioned", columns={"image": "image", "prompt": "text"})
    assert make_plan(mapped).notes == ()
    for path in (tmp_path / "in").glob("*.txt"):
        path.unlink()
    assert make_plan(spec_of(tmp_path / "in", tmp_path / "out", stage="Captioned")).notes == ()
