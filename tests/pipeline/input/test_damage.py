"""Files that are cut, compressed, of another kind than their name says: never read as if they were whole."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.input.source import SourceError
from pipeline.run.plan import make_plan
from tests.support.plain_stages import rows_of, spec_of


def _zstd(data: bytes) -> bytes:
    half = len(data) // 2  # two frames one after the other, as parallel compressors and `cat` make them
    frames = (pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))
    return b"".join(frames)


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gz": partial(gzip.compress, mtime=0), "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstd,
}  # fmt: skip
TEXTS = [f"text {i} {os.urandom(40).hex()}" for i in range(1000)]


def _content(form: str) -> bytes:
    if form == "tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number, text in enumerate(TEXTS):
                info = tarfile.TarInfo(f"{number:04d}.txt")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        return buffer.getvalue()
    if form == "jsonl":
        return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    return ("text,n\n" if form == "csv" else "").encode() + "".join(
        f"{text},1\n" if form == "csv" else f"{text}\n" for text in TEXTS
    ).encode()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_compressed_text_reads_as_if_it_were_not(tmp_path: Path, form: str, codec: str) -> None:
    path = tmp_path / f"in.{form}.{codec}"
    path.write_bytes(CODECS[codec](_content(form)))
    rows = rows_of(path, tmp_path / "out", ["text"], shard_rows=450, columns={"text": "text"})
    assert [row["text"] for row in rows] == TEXTS


@pytest.mark.parametrize("name", ["in.tar.gz", "in.tgz", "in.tar.zst", "in.tar.bz2"])
def test_a_compressed_tar_is_entered_at_every_shard(tmp_path: Path, name: str) -> None:
    codec = {"tgz": "gz"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    (tmp_path / name).write_bytes(CODECS[codec](_content("tar")))
    rows = rows_of(tmp_path / name, tmp_path / "out", ["text"], shard_rows=450, format="webdataset")
    assert [row["text"] for row in rows] == TEXTS


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "tar"])
def test_a_compressed_file_that_is_cut_is_named(tmp_path: Path, form: str, codec: str) -> None:
    data = CODECS[codec](_content(form))
    for share in (0.4, 0.9):
        path = tmp_path / f"in.{form}.{codec}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SourceError, match=rf"in\.{form}\.{codec}.*(cut|damaged)"):
            make_plan(spec_of(path, tmp_path / "out", format={"txt": "text", "tar": "webdataset"}.get(form, form)))


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.csv"])
@pytest.mark.parametrize(
    ("start", "said"),
    [
        (CODECS["gz"](b"x"), "gzip"),
        (CODECS["bz2"](b"x"), "bzip2"),
        (CODECS["xz"](b"x"), "xz"),
        (CODECS["zst"](b"xx"), "zstd"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"PAR1\x15\x04", "Parquet"),
        ("prompt\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_bytes_of_another_kind_are_never_taken_for_rows(tmp_path: Path, name: str, start: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(SourceError, match=rf"{name}: .*{said}"):
        make_plan(spec_of(tmp_path / name, tmp_path / "out"))


@pytest.mark.parametrize(
    "content", ['{\n "prompt": "a",\n "n": 1\n}\n', '[\n {"prompt": "a"}\n]\n', '\ufeff[{"a": 1}]']
)
def test_json_that_is_no_jsonl_is_refused_whole(tmp_path: Path, content: str) -> None:
    (tmp_path / "in.json").write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=r"in\.json: is .*write one JSON object a line"):
        make_plan(spec_of(tmp_path / "in.json", tmp_path / "out"))


def test_a_key_that_stands_twice_fails_its_row(tmp_path: Path) -> None:
    lines = [
        '{"text": "a", "text": "b"}', '{"text": "c", "more": {"text": "d"}}', r'{"text": "says \"text\" twice"}',
        '{"text": "e", "n": 1, "n": 2}', '{"more": {"text": "f", "text": "g"}}',
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", columns={"text": "text"})
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "ok", "ok"]
    assert "row 0 of in.jsonl has the key 'text' twice" in rows[0]["error"]
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "all")
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "failed", "ok"]


def test_a_csv_that_ends_inside_quotes_is_refused(tmp_path: Path) -> None:
    """An open quote makes one row of all that follows; the reader of the standard library says nothing."""
    path = tmp_path / "in.csv"
    path.write_text('text,n\na,1\n"b,2\nc,3\nd,4\n')
    with pytest.raises(SourceError, match=r"in\.csv ends inside quotes that are opened in row 1, .*'\"b,2'"):
        make_plan(spec_of(path, tmp_path / "out"))
    whole = {
        'text,n\na,1\n"b\nc",2\n': 2, 'text,n\na,1\nb,"2"': 2, 'text\n"a ""quoted"" word"\n': 1, 'text\n"a" b\n': 1,
    }  # fmt: skip
    for content, rows in whole.items():
        path.write_text(content)
        assert make_plan(spec_of(path, tmp_path / "out")).rows == rows


def test_a_csv_that_was_cut_in_a_row_fails_that_row(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("n,text,url\n1,a,x\n2,b")
    rows = rows_of(tmp_path / "in.csv", tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert "row 1 of in.csv has 2 cells, the header has 3" in rows[1]["error"]


def test_a_csv_header_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b"texte,pr\xe9nom\na,b\n")
    with pytest.raises(SourceError, match=r"in\.csv: its header is not UTF-8"):
        make_plan(spec_of(path, tmp_path / "out"))
    path.write_bytes(b"text,n\ra,1\rb,2\r")
    with pytest.raises(SourceError, match=r"in\.csv: its header cannot be read"):
        make_plan(spec_of(path, tmp_path / "out"))


def test_a_delimiter_within_quotes_is_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('"text, in short, or long";n\na;1\n')
    rows = rows_of(tmp_path / "in.csv", tmp_path / "out", ["n"], columns={"text": "text, in short, or long"})
    assert [(row["length"], row["n"]) for row in rows] == [(1, "1")]
