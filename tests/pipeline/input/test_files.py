"""Which files of a folder or a glob are read, and what is said of the others."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.input.files import list_files, resolve
from pipeline.input.source import Source, SourceError
from pipeline.run.plan import make_plan
from tests.support.plain_stages import rows_of, spec_of


def _names(path: Path | str, **source: object) -> list[str]:
    return [file.name for file in list_files(resolve(Source((str(path),), **source)))]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("count", [2, 501, 600])
def test_pictures_with_captions_beside_them_are_pictures(tmp_path: Path, suffix: str, count: int) -> None:
    for number in range(count):
        (tmp_path / f"{number:04d}.{suffix}").write_bytes(b"x")
        (tmp_path / f"{number:04d}.txt").write_text("a caption")
    expected = [f"{number:04d}.{suffix}" for number in range(count)]
    assert _names(tmp_path) == _names(f"{tmp_path}/*") == expected
    (tmp_path / "0000b.txt").write_text("prompts of their own")
    with pytest.raises(SourceError, match="holds images and text"):
        _names(tmp_path)
    assert _names(tmp_path, format="images") == expected


def _notes(path: Path, out: Path, **source: object) -> tuple[str, ...]:
    return make_plan(spec_of(path, out, **source)).notes


def test_pictures_by_any_of_their_usual_names(tmp_path: Path) -> None:
    names = ["_DSC0001.JPG", "_MG_0002.jpeg", "a.jfif", "b.jpe", "c.PNG", "d.pgm", "e.tga"]
    for name in [*names, ".hidden.jpg", "._a.jpg", "_SUCCESS", "_odd.parquet", "notes.md", "f.heic", "g.heic"]:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "in/_thumbs").mkdir()
    (tmp_path / "in/_thumbs/a.jpg").write_bytes(b"x")
    assert sorted(_names(tmp_path / "in")) == sorted(names)
    assert _notes(tmp_path / "in", tmp_path / "out") == (
        "left out of the input, with the first name of each kind: 2 hidden ('._a.jpg'), 2 called .heic ('f.heic'), "
        "1 files whose names begin with _ ('_odd.parquet'), 1 folders whose names begin with _ ('_thumbs'), "
        "1 called .md ('notes.md')",
    )


def test_a_picture_with_an_underscore_does_not_change_what_a_folder_of_tables_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("a\n")
    (tmp_path / "in/_preview.png").write_bytes(b"x")
    assert _names(tmp_path / "in") == ["a.txt"]
    assert "1 called .png" in _notes(tmp_path / "in", tmp_path / "out")[0]
    (tmp_path / "in/a.txt").unlink()
    assert _names(tmp_path / "in") == ["_preview.png"]


def test_linked_folders_are_followed_and_never_round_in_circles(tmp_path: Path) -> None:
    for name in ("here/a.png", "there/b.png", "there/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "here/linked").symlink_to("../there")
    (tmp_path / "there/deep/up").symlink_to(tmp_path / "here")
    (tmp_path / "here/again.png").symlink_to("a.png")
    expected = ["a.png", "again.png", "linked/b.png", "linked/deep/c.png"]
    assert _names(tmp_path / "here") == expected
    (tmp_path / "here/nowhere.png").symlink_to("gone.png")
    twice = "; what two names stand for is read twice, unless `dedupe: content` is set"
    assert _notes(tmp_path / "here", tmp_path / "out") == (
        "left out of the input, with the first name of each kind: 1 links to a folder that they lie in ('up'), "
        "1 links that lead nowhere ('nowhere.png')",
        f"1 files of the input are links (first: 'again.png'){twice}",
        f"1 folders of the input are links (first: 'linked'){twice}",
    )
    (tmp_path / "linked-root").symlink_to(tmp_path / "here")
    assert _names(tmp_path / "linked-root") == expected


@pytest.mark.parametrize("pattern", ["", "/*.png"])
def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path, pattern: str) -> None:
    """Listed, it had the link's own time stamp, and its file was held to have changed when it was opened."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "in/a.png")
    os.utime(tmp_path / "in/a.png", (1e9, 1e9))
    (tmp_path / "in/b.png").symlink_to("a.png")
    rows = rows_of(f"{tmp_path}/in{pattern}", tmp_path / "out", stage="Captioned")
    assert [(row["id"], row["status"], row["width"]) for row in rows] == [("a.png", "ok", 3), ("b.png", "ok", 3)]


def test_of_a_dataset_that_was_saved_twice_only_the_last_is_read(tmp_path: Path) -> None:
    import datasets

    def save(texts: list[str], folder: Path, shards: int) -> None:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder), num_shards=shards)

    save([f"old {i}" for i in range(6)], tmp_path / "in", 3)
    save(["a", "b"], tmp_path / "in", 1)
    rows = rows_of(tmp_path / "in", tmp_path / "out", ["text"])
    assert [row["text"] for row in rows] == ["a", "b"]
    assert "3 data files that state.json does not name" in _notes(tmp_path / "in", tmp_path / "none")[0]
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    both = datasets.DatasetDict(splits)
    both.save_to_disk(str(tmp_path / "splits"))
    assert len(_names(tmp_path / "splits")) == 2
    datasets.DatasetDict(train=both["train"]).save_to_disk(str(tmp_path / "splits"))
    assert [name.partition("/")[0] for name in _names(tmp_path / "splits")] == ["train"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a red star".encode("utf-8-sig"), "a red star"),
        ("é".encode("latin-1"), None),
        ("a".encode("utf-16"), None),
        (b" a \r\n", "a"),
    ],
)
def test_captions_by_windows_editors(tmp_path: Path, content: bytes, said: str | None) -> None:
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    (tmp_path / "in/a.png").write_bytes(buffer.getvalue())
    (tmp_path / "in/a.txt").write_bytes(content)
    columns = {"image": "image", "prompt": "text"}
    (row,) = rows_of(tmp_path / "in", tmp_path / "out", stage="Captioned", columns=columns)
    assert (row["status"], row["said"]) == (("ok", said) if said else ("failed", None))
    if said is None:
        assert "bytes that are no UTF-8 text" in row["error"]
    (row,) = rows_of(tmp_path / "in", tmp_path / "unread", stage="Captioned", columns={"image": "image"})
    assert row["status"] == "ok"


@pytest.mark.parametrize("empty", [None, float("nan"), ""])
def test_an_id_that_is_missing_is_named_by_its_row(tmp_path: Path, empty: object) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "t", "k": k}) + "\n" for k in ("x", empty)))
    with pytest.raises(SourceError, match=r"in\.jsonl, row 1: the id column 'k' is empty"):
        make_plan(spec_of(tmp_path / "in.jsonl", tmp_path / "out", id="k"))


def test_nan_ids_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "k": [1.0, float("nan")]}), tmp_path / "in.parquet")
    with pytest.raises(SourceError, match=r"row 1: the id column 'k' is empty"):
        make_plan(spec_of(tmp_path / "in.parquet", tmp_path / "out", id="k"))


@pytest.mark.parametrize(
    "column", [pa.array([["a"], ["b"]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"\xff", b"\xfe"])]
)
def test_an_id_is_text_or_a_number(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "k": column}), tmp_path / "in.parquet")
    with pytest.raises(SourceError, match=r"row 0: the id column 'k' holds .*; write text or numbers"):
        make_plan(spec_of(tmp_path / "in.parquet", tmp_path / "out", id="k"))


def test_ids_of_several_types(tmp_path: Path) -> None:
    for name, column, ids in (("bytes", pa.array([b"a", b"b"]), ["a", "b"]), ("ints", pa.array([3, 4]), ["3", "4"])):
        pq.write_table(pa.table({"text": ["a", "b"], "k": column}), tmp_path / f"{name}.parquet")
        rows = rows_of(tmp_path / f"{name}.parquet", tmp_path / name, id="k")
        assert [row["id"] for row in rows] == ids
    (tmp_path / "in.jsonl").write_text('{"text": "a", "k": 1}\n{"text": "b", "k": "1"}\n')
    with pytest.raises(SourceError, match=r"two rows share the id '1'"):
        make_plan(spec_of(tmp_path / "in.jsonl", tmp_path / "out", id="k"))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_image_folder_with_its_table_is_told_how_to_be_read(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        (tmp_path / f"in/{split}").mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(tmp_path / f"in/{split}/a.png")
        table = (
            "file_name,text\na.png,a red star\n" if form == "csv" else '{"file_name": "a.png", "text": "a red star"}\n'
        )
        (tmp_path / f"in/{split}/metadata.{form}").write_text(table)
    with pytest.raises(SourceError, match="folder of pictures with tables") as told:
        resolve(Source((str(tmp_path / "in"),)))
    path, columns = f"{tmp_path}/in/**/metadata.{form}", {"image": "file_name", "prompt": "text"}
    assert f"path: {path}, with columns: {{image: file_name, prompt: text}}" in str(told.value)
    rows = rows_of(path, tmp_path / "out", stage="Captioned", columns=columns)
    assert [(row["said"], row["width"]) for row in rows] == [("a red star", 6)] * 2
