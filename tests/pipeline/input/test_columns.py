"""Columns whose types or whose presence differ between the files, or the rows, of one input."""

from __future__ import annotations

import csv
import datetime
import io
import json
import tarfile
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.input.files import resolve
from pipeline.input.source import Source, SourceError
from pipeline.output.schema import table
from pipeline.pictures import encode_picture
from pipeline.run.columns import check_needs, look
from pipeline.run.draft import draft
from pipeline.run.plan import make_plan
from tests.support.faulty import data
from tests.support.plain_stages import rows_of, spec_of


def _two_files(folder: Path, one: pa.Array, other: pa.Array) -> Path:
    folder.mkdir()
    for name, values in (("0", one), ("1", other)):
        table = pa.table({"text": pa.array(["t"] * len(values)), "kept": values})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


DRIFTS: list[tuple[str, pa.Array, pa.Array, list[Any]]] = [
    ("whole, then fractions", pa.array([1]), pa.array([1.75]), [1.0, 1.75]),
    ("fractions, then whole", pa.array([1.75]), pa.array([1]), [1.75, 1.0]),
    ("narrow, then wide", pa.array([1], pa.int8()), pa.array([1 << 40]), [1, 1 << 40]),
    ("float32, then int32", pa.array([0.5], pa.float32()), pa.array([16777217], pa.int32()), [0.5, 16777217.0]),
    ("nothing, then text", pa.array([None], pa.null()), pa.array(["someone"]), [None, "someone"]),
    ("text, then nothing", pa.array(["someone"]), pa.array([None], pa.null()), ["someone", None]),
    ("large text", pa.array(["a"]), pa.array(["b"], pa.large_string()), ["a", "b"]),
    ("text views", pa.array(["a"], pa.string_view()), pa.array(["b"]), ["a", "b"]),
    ("dictionary", pa.array(["a"]).dictionary_encode(), pa.array(["b"]), ["a", "b"]),
    ("empty lists", pa.array([[]], pa.list_(pa.null())), pa.array([["x"]]), [[], ["x"]]),
    ("lists of numbers", pa.array([[1, 2]]), pa.array([[0.5]]), [[1.0, 2.0], [0.5]]),
    ("vectors of two widths", pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)),
     pa.array([[3.0]], pa.list_(pa.float32(), 1)), [[1.0, 2.0], [3.0]]),
    ("more fields", pa.array([{"a": 1}]), pa.array([{"a": 2, "b": "x"}]), [{"a": 1, "b": None}, {"a": 2, "b": "x"}]),
    ("units of time", pa.array([0], pa.timestamp("s")), pa.array([1], pa.timestamp("us")),
     [datetime.datetime(1970, 1, 1), datetime.datetime(1970, 1, 1, 0, 0, 0, 1)]),
    ("decimals, then whole", pa.array([Decimal("1.50")]), pa.array([2]), [Decimal("1.50"), Decimal("2.00")]),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "expected"), [case[1:] for case in DRIFTS], ids=[case[0] for case in DRIFTS])
def test_values_survive_when_types_widen(tmp_path: Path, one: pa.Array, other: pa.Array, expected: list[Any]) -> None:
    rows = rows_of(_two_files(tmp_path / "in", one, other), tmp_path / "out", ["kept"])
    assert [(row["status"], row["kept"]) for row in rows] == [("ok", value) for value in expected]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array(["n/a"])),
        (pa.array([True]), pa.array([1])),
        (pa.array(["a"]), pa.array([b"a"])),
        (pa.array([["a"]]), pa.array([[b"a"]])),
        (pa.array(["a"]), pa.array([{"en": "a"}])),
        (pa.array([1 << 63], pa.uint64()), pa.array([-1])),
        (pa.array([Decimal("0.1")]), pa.array([0.1])),
    ],
)
def test_types_that_do_not_go_together_are_named_before_any_work(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    spec = spec_of(_two_files(tmp_path / "in", one, other), tmp_path / "out", ["kept"])
    with pytest.raises(SourceError, match=r"'kept' is .* in .*0\.parquet and .* in .*1\.parquet"):
        make_plan(spec)
    assert not (tmp_path / "out").exists()


def test_a_number_that_the_wider_type_cannot_hold_fails_its_row(tmp_path: Path) -> None:
    rows = rows_of(_two_files(tmp_path / "in", pa.array([(1 << 60) + 1]), pa.array([0.5])), tmp_path / "out", ["kept"])
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "'kept'" in rows[0]["error"]
    assert rows[0]["kept"] is None


def test_what_the_beginning_tells_is_still_what_a_resumed_run_is_compared_by(tmp_path: Path) -> None:
    """Folders that were planned by the first file alone go on."""
    spec = spec_of(_two_files(tmp_path / "in", pa.array([1]), pa.array([1.75])), tmp_path / "out", ["kept"])
    assert "kept: int64" in draft(spec).fields["output columns"]


def test_a_column_that_a_stage_needs_is_missed_in_any_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"caption": ["a red star"]}), tmp_path / "in/0.parquet")
    pq.write_table(pa.table({"Caption": ["a blue circle"]}), tmp_path / "in/1.parquet")
    spec = spec_of(tmp_path / "in", tmp_path / "out", columns={"text": "caption"})
    with pytest.raises(SourceError, match=r"1\.parquet has no column 'caption'; did you mean 'Caption'\?"):
        make_plan(spec)
    with pytest.raises(SourceError, match=r"id: .*1\.parquet has no column 'caption'"):
        make_plan(spec_of(tmp_path / "in", tmp_path / "out", id="caption"))


def test_a_csv_without_the_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.csv").write_text("caption,n\na,1\n")
    (tmp_path / "in/1.csv").write_text("text,n\nb,2\n")
    with pytest.raises(SourceError, match=r"1\.csv has no column 'caption'; it has text, n"):
        make_plan(spec_of(tmp_path / "in", tmp_path / "out", columns={"text": "caption"}))


@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_kept_column_that_one_file_lacks_is_null_there(tmp_path: Path, form: str, lacking: int) -> None:
    (tmp_path / "in").mkdir()
    for number in (0, 1):
        row = {"text": "t"} if number == lacking else {"text": "t", "author": "someone"}
        path = tmp_path / f"in/{number}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        elif form == "csv":
            with open(path, "w", newline="") as handle:
                writer = csv.DictWriter(handle, list(row))
                writer.writeheader()
                writer.writerow(row)
        else:
            path.write_text(json.dumps(row) + "\n")
    rows = rows_of(tmp_path / "in", tmp_path / "out", ["author"], columns={"text": "text"})
    expected = [None if number == lacking else "someone" for number in (0, 1)]
    assert [(row["status"], row["author"]) for row in rows] == [("ok", value) for value in expected]


def _tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            data = json.dumps(sample).encode()
            info = tarfile.TarInfo(f"{number:05d}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", ["jsonl", "tar"])
def test_a_key_that_comes_late_is_a_column(tmp_path: Path, form: str) -> None:
    samples: list[dict[str, Any]] = [{"t": f"text {i}"} for i in range(230)] + [
        {"t": "last", "author": "someone", "k": 5}
    ]
    if form == "jsonl":
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    else:
        path = _tar(tmp_path / "in.tar", samples)
    rows = rows_of(path, tmp_path / "out", ["author", "k"], columns={"text": "t"})
    assert [row["author"] for row in rows] == [None] * 230 + ["someone"]
    assert rows[-1]["k"] == 5
    mapped = rows_of(path, tmp_path / "mapped", columns={"text": "author"})
    assert [row["length"] for row in mapped] == [None] * 230 + [7]
    with pytest.raises(SourceError, match=r"has no column 'autor'; did you mean 'author'\?"):
        draft(spec_of(path, tmp_path / "none", ["autor", "author"]))


LATE = [
    ("whole, then fractions", [1] * 210 + [1.75], pa.float64(), 1.75),
    ("null, then whole", [None] * 210 + [3], pa.int64(), 3),
    ("whole, then text", [1] * 210 + ["n/a"], pa.string(), '"n/a"'),
    ("whole, then huge", [1] * 210 + [1 << 63], pa.uint64(), 1 << 63),
    ("whole, then beyond all", [1] * 210 + [1 << 70], pa.string(), str(1 << 70)),
    ("huge beside fractions", [0.5] * 210 + [(1 << 60) + 1], pa.string(), str((1 << 60) + 1)),
    ("text, then a list", ["a"] * 210 + [["b"]], pa.string(), '["b"]'),
    ("truth, then whole", [True] * 210 + [1], pa.string(), "1"),
]


@pytest.mark.parametrize(("values", "kind", "last"), [case[1:] for case in LATE], ids=[case[0] for case in LATE])
def test_every_row_has_its_say_in_a_types_choice(
    tmp_path: Path, values: list[Any], kind: pa.DataType, last: Any
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "t", "kept": value}) + "\n" for value in values))
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", ["kept"])
    assert data(str(tmp_path / "out")).schema.field("kept").type == kind
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[-1]["kept"] == last
    first = values[0]
    assert rows[0]["kept"] == (json.dumps(first) if kind == pa.string() else first)


def test_pictures_are_one_type_however_files_write_them(tmp_path: Path) -> None:
    turned = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    first, second = encode_picture(Image.new("RGB", (8, 8), "red")), encode_picture(Image.new("RGB", (8, 8), "blue"))
    picture = {"path": None, "bytes": second}
    one = pa.array([{"bytes": first, "path": "a.png"}])
    path = _two_files(tmp_path / "in", one, pa.array([picture], turned))
    rows = rows_of(path, tmp_path / "out", ["kept"], columns={"text": "text"})
    assert [row["kept"]["bytes"] for row in rows] == [first, second]
    noted = json.loads(data(str(tmp_path / "out")).schema.metadata[b"huggingface"])
    assert noted["info"]["features"]["kept"] == {"_type": "Image"}


def test_arrays_of_several_lengths_are_lists_not_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for number, length in enumerate((2, 3)):
            buffer = io.BytesIO()
            np.save(buffer, np.arange(length, dtype=np.float32) / 2)
            info = tarfile.TarInfo(f"{number}.npy")
            info.size = len(buffer.getvalue())
            buffer.seek(0)
            tar.addfile(info, buffer)
    rows = rows_of(tmp_path / "in.tar", tmp_path / "out", ["npy"])
    assert [row["npy"] for row in rows] == [[0.0, 0.5], [0.0, 0.5, 1.0]]


def test_a_fraction_is_never_cut_to_a_whole_number() -> None:
    """Types that an older plan settled by the first file alone cannot be widened any more."""
    schema = pa.schema([("id", pa.string()), ("n", pa.int64()), ("status", pa.string()), ("error", pa.string())])
    rows = [{"id": str(n), "n": n, "status": "ok", "error": None} for n in (1, 2.0, 1.75)]
    out = table(rows, schema, frozenset({"n"})).to_pylist()
    assert [(row["status"], row["n"]) for row in out] == [("ok", 1), ("ok", 2), ("failed", None)]
    assert "1.75 is no whole number" in out[2]["error"]


def test_a_kept_column_that_files_lack_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        row = {"text": "t"} | ({"author": "someone"} if number == 1 else {})
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"in/{number}.parquet")
    (note,) = make_plan(spec_of(tmp_path / "in", tmp_path / "out", ["author"])).notes
    assert "'author' is not in 2 files" in note
    assert "0.parquet" in note
    assert make_plan(spec_of(tmp_path / "in/1.parquet", tmp_path / "out", ["author"])).notes == ()


def _kinds() -> dict[str, pa.Array]:
    """A column of each kind, with null where it can be."""
    big = (1 << 60) + 1
    return {
        "uint64": pa.array([(1 << 63) + 5, None], pa.uint64()),
        "float16": pa.array([np.float16(0.5), None], pa.float16()),
        "nanoseconds": pa.array([1234567890123456000, None], pa.timestamp("ns")),
        "zone": pa.array([1234567890, None], pa.timestamp("s", "Europe/Berlin")),
        "date": pa.array([datetime.date(2020, 1, 2), None]),
        "duration": pa.array([5000, None], pa.duration("ns")),
        "decimal": pa.array([Decimal("1.50"), None]),
        "bytes": pa.array([b"\x00\xff", None]),
        "fixed bytes": pa.array([b"abcd", None], pa.binary(4)),
        "text view": pa.array(["a", None], pa.string_view()),
        "dictionary": pa.array(["a", None]).dictionary_encode(),
        "whole numbers with gaps": pa.array([[1, None, 3], None]),
        "huge numbers beside gaps": pa.array([[big], [None, big]]),
        "fractions with gaps": pa.array([[1.5, None], []]),
        "huge unsigned": pa.array([[(1 << 63) + 1], []], pa.list_(pa.uint64())),
        "half floats": pa.array([[np.float16(1)], []], pa.list_(pa.float16())),
        "truth values": pa.array([[True, None], []]),
        "vectors": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        "lists of lists": pa.array([[[1, 2], [3]], []]),
        "structs": pa.array([{"a": 1, "b": [1.5]}, None]),
        "maps": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "nothing": pa.array([None, None], pa.null()),
    }


@pytest.mark.parametrize("kind", _kinds())
def test_a_kept_column_comes_out_as_it_went_in(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "kept": _kinds()[kind]}), tmp_path / "in.parquet")
    rows = rows_of(tmp_path / "in.parquet", tmp_path / "out", ["kept"])
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert [row["kept"] for row in rows] == pq.read_table(tmp_path / "in.parquet")["kept"].to_pylist()


PICTURE = {"bytes": b"\x89PNG", "path": "0.png"}
NOWHERE = [
    ({"jpg": [b"\xff\xd8"], "__key__": ["0"]}, "there is no such column, but jpg, __key__.* {image: jpg}"),
    ({"views": [PICTURE], "text": ["a cat"]}, "no such column, but views, text.* {image: views, prompt: text}"),
    ({"images": [[PICTURE]], "prompt": ["a"]}, "but images, prompt.* {image: ..., prompt: prompt}"),
    ({"image": [[PICTURE]]}, "'image' holds list<.*>, and the job takes one picture a row"),
    ({"image": [{"height": 1}]}, "'image' holds struct<height: int64>, and"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "says"), NOWHERE)
def test_a_plan_whose_every_row_would_fail_is_refused(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(SourceError, match=says):
        draft(spec_of(tmp_path / "in.parquet", tmp_path / "out", stage="Captioned"))


def test_pictures_that_a_later_file_alone_has_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in/0.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "image": [PICTURE]}), tmp_path / "in/1.parquet")
    draft(spec_of(tmp_path / "in", tmp_path / "out", stage="Captioned"))


def test_a_column_of_several_captions_a_row_is_noted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PICTURE], "said": [["a", "b"]]}), tmp_path / "in.parquet")
    mapped = {"columns": {"image": "image", "prompt": "said"}}
    notes = draft(spec_of(tmp_path / "in.parquet", tmp_path / "out", stage="Captioned", **mapped)).notes
    assert "input.columns.prompt: the column 'said' holds list<" in notes[0]
    assert "every row that has one will fail" in notes[0]


def _nested(form: str, folder: Path) -> Path:
    rows = [{"json": {"prompt": f"p{i}", "of": {"lang": "en"}, "seed": i}, "json.flat": f"f{i}"} for i in range(3)]
    rows[1]["json"] = {"prompt": None, "of": None, "seed": 1}
    path = folder / f"in.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data_dir = folder / "in"
        datasets.Dataset.from_list(rows).save_to_disk(data_dir)
        return data_dir
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "datasets"])
def test_what_lies_in_an_object_is_mapped_by_its_path(tmp_path: Path, form: str) -> None:
    columns = {"text": "json.prompt", "lang": "json.of.lang", "seed": "json.seed", "flat": "json.flat"}
    rows = rows_of(_nested(form, tmp_path), tmp_path / "out", ["lang", "seed", "flat"], columns=columns)
    assert [(row["length"], row["lang"], row["seed"], row["flat"]) for row in rows] == [
        (2, "en", 0, "f0"), (None, None, 1, "f1"), (2, "en", 2, "f2"),
    ]  # fmt: skip


def test_an_object_of_a_later_file_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jsonl").write_text('{"json": {}}\n' * 300)
    (tmp_path / "in/1.jsonl").write_text('{"json": {"prompt": "ab"}}\n')
    rows = rows_of(tmp_path / "in", tmp_path / "out", columns={"text": "json.prompt"})
    assert [row["length"] for row in rows] == [None] * 300 + [2]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("given", "says"),
    [({"columns": {"text": "json.prmpt"}}, "columns.text: .*no column 'json.prmpt'; .*json"),
     ({"columns": {"text": "json.prompt.x"}}, "no column 'json.prompt.x'"),
     ({"keep": ["json.prompt"]}, r"keep: .*no column 'json.prompt'; .*columns: \{...: json.prompt\}"),
     ({"id": "json.seed"}, r"input.id: .*no column 'json.seed'")],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, form: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(SourceError, match=says):
        make_plan(spec_of(_nested(form, tmp_path), tmp_path / "out", **given))


def test_the_object_that_is_asked_for_stands_once(tmp_path: Path) -> None:
    inner = pa.array([{"prompt": "a"}])
    pq.write_table(pa.Table.from_arrays([inner, inner], names=["json", "json"]), tmp_path / "in.parquet")
    with pytest.raises(SourceError, match="has the column 'json' twice"):
        make_plan(spec_of(tmp_path / "in.parquet", tmp_path / "out", columns={"text": "json.prompt"}))
    (tmp_path / "in.jsonl").write_text('{"json": {"prompt": "a"}, "json": {"prompt": "b"}}\n')
    (row,) = rows_of(tmp_path / "in.jsonl", tmp_path / "out", columns={"text": "json.prompt"})
    assert "the key 'json' twice" in row["error"]


NEEDS = {("anchor",): "aapb draws by an anchor", ("pictures", "with"): "slerp starts from pictures"}


def needing(path: Path, columns: Mapping[str, str] | None = None) -> None:
    source = resolve(Source((str(path),), columns=columns or {}))
    check_needs(source, look(source, {}, None, None), NEEDS)


def test_an_input_without_what_every_row_needs_is_refused_as_a_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "anchor": "b", "with": ["0.png"]}, {"prompt": "c"}]
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    needing(whole)
    half.write_text("".join(json.dumps({"prompt": "a", "anchor": "b"}) + "\n" for _ in range(300)))
    with pytest.raises(SourceError, match=r"slerp starts from pictures: .* 'pictures' or 'with', but anchor, prompt"):
        needing(half)
    with half.open("a") as handle:  # far behind the rows that are looked at first
        handle.write(json.dumps({"pictures": []}) + "\n")
    needing(half)
    with pytest.raises(SourceError, match=r"aapb draws by an anchor: .* no column 'anchor', but prompt, with; write"):
        needing(whole, {"prompt": "prompt", "with": "with"})
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"anchor": ["a"], "prompt": ["b"]}), table)
    with pytest.raises(SourceError, match="no column 'pictures' or 'with', but anchor, prompt"):
        needing(table)
