"""Nasty inputs: whatever a row is, it comes out as a row, with a reason that a user can act on."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.input.source import Source
from pipeline.output.verify import verify
from pipeline.pictures import PictureError, decode_picture
from pipeline.run.draft import RunSpec
from tests.support.faulty import data, run_plain, spec_for

LIMIT = 100_000_000

SIZES = StageSpec("tests.pipeline.input.test_inputs:Sizes")


class Sizes:
    """Size and mean colour of a picture, or length of a text."""

    @staticmethod
    def describe() -> StageInfo:
        return StageInfo((Column("width", "int64"), Column("mean", "tensor", (3,)), Column("length", "int64")))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            picture = row.get("image")
            text = row.get("text")
            if picture is not None:
                assert picture.mode == "RGB"
                mean = np.asarray(picture, np.float64).mean((0, 1))
                yield ok(row, width=picture.width, mean=mean)
            else:
                yield ok(row, length=None if text is None else len(text))


def _bytes(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _bomb() -> bytes:
    """A PNG whose header promises 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _pictures() -> dict[str, bytes]:
    red = Image.new("RGB", (32, 20), (200, 30, 30))
    palette = Image.new("P", (32, 20), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    deep = Image.fromarray(np.full((20, 32), 0x8000, np.uint16))
    return {
        "animated.gif": _bytes(red, "GIF", save_all=True, append_images=[red.point(lambda v: 255 - v)]),
        "bomb.png": _bomb(),
        "cmyk.jpg": _bytes(red.convert("CMYK"), "JPEG"),
        "deep.png": _bytes(deep, "PNG"),
        "empty.png": b"",
        "one.png": _bytes(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"),
        "palette.png": _bytes(palette, "PNG", transparency=1),
        "rotated.jpg": _bytes(red, "JPEG", exif=exif),
        "text.jpg": b"<html>404 not found</html>",
        "truncated.jpg": _bytes(noise, "JPEG")[:-900],
    }


def test_every_picture_comes_out_as_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in _pictures().items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("not a picture, and no row")
    source = Source((str(folder),), columns={"image": "image"})
    spec = replace(spec_for(tmp_path, []), stage=SIZES, source=source, keep=("image",),
                   shard_rows=4)  # fmt: skip
    run_plain(spec)
    assert verify(spec.output).ok
    table = data(spec.output)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert sorted(rows) == sorted(_pictures())
    assert {name for name, row in rows.items() if row["status"] == "failed"} == {
        "bomb.png", "empty.png", "text.jpg", "truncated.jpg"}  # fmt: skip
    assert "20000x20000" in rows["bomb.png"]["error"] or "too large" in rows["bomb.png"]["error"]
    assert "zero bytes" in rows["empty.png"]["error"]
    assert "not a picture" in rows["text.jpg"]["error"]
    assert "truncated" in rows["truncated.jpg"]["error"]
    assert rows["rotated.jpg"]["width"] == 20
    assert np.allclose(rows["animated.gif"]["mean"], [200, 30, 30], atol=3)
    assert np.allclose(rows["cmyk.jpg"]["mean"], [200, 30, 30], atol=6)
    assert np.allclose(rows["deep.png"]["mean"], [128, 128, 128], atol=1)
    assert np.allclose(rows["palette.png"]["mean"], [255, 255, 255])
    assert rows["truncated.jpg"]["image"] is None
    assert rows["cmyk.jpg"]["image"]["bytes"] == _pictures()["cmyk.jpg"]


def test_limit_of_pixels_is_checked_before_decoding() -> None:
    with pytest.raises(PictureError, match="above the limit"):
        decode_picture(_bytes(Image.new("RGB", (100, 100)), "PNG"), 9_999)
    assert decode_picture(_bytes(Image.new("RGB", (100, 100)), "PNG"), 10_000).size == (100, 100)


def test_damage_anywhere_never_escapes() -> None:
    rng = np.random.default_rng(1)
    for name, content in _pictures().items():
        for _ in range(12):
            broken = bytearray(content)
            for at in rng.integers(0, max(1, len(broken)), 3):
                if broken:
                    broken[at] = int(rng.integers(256))
            try:
                mode = decode_picture(bytes(broken), 10_000).mode
            except PictureError:
                mode = "RGB"
            assert mode == "RGB", name


def test_one_percent_truncated_in_a_tar_with_climbing_names(tmp_path: Path) -> None:
    good = _bytes(Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)), "JPEG")
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(200):
            key = f"../../etc/cron.d/{i:03d}" if i % 50 == 0 else f"{i:03d}"
            picture = good[:-200] if i in (7, 107) else good
            for name, content in ((f"{key}.jpg", picture), (f"{key}.txt", f"no {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("999.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    source = Source((str(path),), columns={"image": "image", "text": "text"})
    spec = replace(spec_for(tmp_path, []), stage=SIZES, source=source, keep=("text",),
                   shard_rows=30)  # fmt: skip
    run_plain(spec)
    assert verify(spec.output).ok
    rows = data(spec.output).to_pylist()
    assert [row["text"] for row in rows] == [f"no {i}" for i in range(200)]
    assert [i for i, row in enumerate(rows) if row["status"] == "failed"] == [7, 107]
    assert rows[50]["id"] == "shard-000.tar/../../etc/cron.d/050"
    assert not (tmp_path.parent / "etc").exists()
    assert set(before) <= {p.name for p in tmp_path.rglob("*")}


PROMPTS = [
    "", " ", "x" * 10_000, "日本語の写真", "صورة قطة", "🎨" * 50, "<script>alert(1)</script>", "tab\there",
    "bell\x07 nul\x00", "a\u2028b\u0085c", None, "\ud800 lone",
]  # fmt: skip


def test_every_prompt_comes_out_as_a_row(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"caption": prompt}) for prompt in PROMPTS]
    lines += ["{not json", '"just a string"', "[1, 2]", '{"other": 1}']
    path.write_bytes("\n".join(lines).encode() + b'\n{"caption": "\xff\xfe"}\n')
    source = Source((str(path),), columns={"text": "caption"})
    spec: RunSpec = replace(spec_for(tmp_path, []), stage=SIZES, source=source,
                            keep=("text",), shard_rows=5)  # fmt: skip
    run_plain(spec)
    assert verify(spec.output).ok
    rows = data(spec.output).to_pylist()
    assert len(rows) == len(PROMPTS) + 5
    for prompt, row in zip(PROMPTS[:-1], rows, strict=False):
        assert (row["status"], row["text"]) == ("ok", prompt)
        assert row["length"] == (None if prompt is None else len(prompt))
    assert rows[11]["status"] == "failed"  # no text file could hold it
    for row in rows[12:15]:
        assert row["status"] == "failed"
        assert "JSON" in row["error"]
    assert (rows[15]["status"], rows[15]["text"]) == ("ok", None)
    assert "UTF-8" in rows[16]["error"] or "utf-8" in rows[16]["error"]


def test_text_files_count_lines_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\r\nth\xffird\nfour\x00th\x1c\x85\nlast without newline")
    source = Source((str(path),), columns={"text": "text"})
    spec = replace(spec_for(tmp_path, []), stage=SIZES, source=source, keep=("text",),
                   shard_rows=2)  # fmt: skip
    path.write_bytes(path.read_bytes().replace(b"\x85", b""))
    run_plain(spec)
    rows = data(spec.output).to_pylist()
    assert [row["text"] for row in rows] == ["first", "", None, "four\x00th\x1c", "last without newline"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok", "ok"]
    assert [row["id"] for row in rows] == [f"p.txt#{i}" for i in range(5)]
