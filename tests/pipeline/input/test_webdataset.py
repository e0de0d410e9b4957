"""Tars as they are found: from a Mac, unsorted, cut, with members twice, with JSON that says `image`."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.input.files import list_files, resolve
from pipeline.input.read import reader_of
from pipeline.input.source import Source, SourceError
from pipeline.run.plan import make_plan
from tests.support.plain_stages import rows_of, spec_of
from tests.support.weather import s3_server

Members = list[tuple[str, bytes]]
JUNK = b"\0\5\x16\7" + b"\0" * 60


def _picture(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 4), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _rows(folder: Path, members: Members, **others: Any) -> list[dict[str, Any]]:
    return rows_of(_tar(folder / "in.tar", members), folder / "out", stage="Captioned", **others)


def _samples(count: int) -> Members:
    return [m for i in range(count) for m in ((f"{i:03d}.png", _picture(i + 1)), (f"{i:03d}.txt", f"no {i}".encode()))]


MAPPED = {"image": "image", "prompt": "text"}


def test_what_a_mac_adds_is_passed_over(tmp_path: Path) -> None:
    members: Members = [(".DS_Store", JUNK)]
    for name, data in _samples(3):
        members += [(f"._{name}", JUNK), (name, data), (f"__MACOSX/._{name}", JUNK)]
    rows = _rows(tmp_path, members, columns=MAPPED)
    assert [(row["id"], row["said"], row["width"]) for row in rows] == [
        (f"in.tar/{i:03d}/".rstrip("/"), f"no {i}", i + 1) for i in range(3)
    ]


@pytest.mark.parametrize("json_first", [True, False])
def test_members_go_before_json_keys(tmp_path: Path, json_first: bool) -> None:
    said = {
        "image": "cats/000.png",
        "png": "x",
        "txt": "y",
        "text": "of the JSON",
        "__key__": "z",
        "caption": "a red star",
    }
    members: Members = [("000.png", _picture(5)), ("000.txt", b"of the member")]
    described = [("000.json", json.dumps(said).encode())]
    members = described + members if json_first else members + described
    kept = ["image", "png", "txt", "text", "__key__", "caption"]
    (row,) = _rows(tmp_path, members, keep=kept, columns={"image": "image", "prompt": "caption"})
    assert (row["status"], row["width"], row["said"]) == ("ok", 5, "a red star")
    assert row["image"]["bytes"] == row["png"]["bytes"] == _picture(5)
    assert (row["txt"], row["text"], row["__key__"]) == ("of the member", "of the member", "000")


@pytest.mark.parametrize("second", ["000.png", "000.PNG"])
def test_two_members_of_one_kind_fail_their_sample(tmp_path: Path, second: str) -> None:
    members: Members = [
        ("000.png", _picture(1)),
        (second, _picture(2)),
        ("001.png", _picture(3)),
        ("002.png", _picture(4)),
    ]
    rows = _rows(tmp_path, members, columns={"image": "image"})
    assert [(row["status"], row["width"]) for row in rows] == [("failed", None), ("ok", 3), ("ok", 4)]
    assert f"{second} in in.tar: the sample has two members of that kind" in rows[0]["error"]


def test_samples_that_do_not_stand_together_are_refused(tmp_path: Path) -> None:
    unsorted = sorted(_samples(3), key=lambda member: member[0].rpartition(".")[2])
    with pytest.raises(
        SourceError, match=r"in\.tar: the members of the sample '000' do not stand together.*--sort=name"
    ):
        make_plan(spec_of(_tar(tmp_path / "in.tar", unsorted), tmp_path / "out"))


def _cuts(data: bytes) -> dict[str, bytes]:
    """A tar of three samples, each member within one block of 512 bytes and a header of another."""
    broken = bytearray(data)
    broken[2048 + 20] ^= 0xFF
    return {
        "within a member": data[: 2048 + 512 + 20],
        "behind a header": data[: 2048 + 512],
        "within a header": data[: 2048 + 100],
        "damaged header": bytes(broken),
        "another tar behind it": data + data,
    }


@pytest.mark.parametrize("cut", _cuts(b"\0" * 8192))
@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_that_is_not_whole_is_refused_by_name(tmp_path: Path, cut: str, compressed: bool) -> None:
    import gzip

    data = _cuts(_tar(tmp_path / "whole.tar", _samples(3)).read_bytes())[cut]
    path = tmp_path / ("shard-7.tar.gz" if compressed else "shard-7.tar")
    path.write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(SourceError, match=r"shard-7\.tar.*(damaged|more behind)"):
        make_plan(spec_of(path, tmp_path / "out"))


def test_a_tar_that_goes_bad_during_the_run_is_named(tmp_path: Path) -> None:
    from pipeline.input.files import list_files, resolve
    from pipeline.input.read import read_rows
    from pipeline.input.rows import Span
    from pipeline.input.source import Source

    path = _tar(tmp_path / "in.tar", _samples(5))
    source = resolve(Source((str(path),)))
    (file,) = list_files(source)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError, match=r"in\.tar: is damaged"):
        list(read_rows(source, (Span(file.name, file.path, 0, 5),), 0, 5, None))


def test_a_tar_without_an_end_mark_is_read_and_told(tmp_path: Path) -> None:
    path = _tar(tmp_path / "in.tar", _samples(3))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end])
    plan = make_plan(spec_of(path, tmp_path / "out"))
    assert plan.rows == 3
    assert "no end mark and may be cut; 3 samples are there" in plan.notes[0]


def test_links_are_told(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    with tarfile.open(path, "w") as tar:
        data = _picture(3)
        info = tarfile.TarInfo("000.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        for number, kind in enumerate((tarfile.LNKTYPE, tarfile.SYMTYPE), 1):
            link = tarfile.TarInfo(f"{number:03d}.png")
            link.type, link.linkname = kind, "000.png"
            tar.addfile(link)
    plan = make_plan(spec_of(path, tmp_path / "out"))
    assert plan.rows == 1
    assert "2 links are left out" in plan.notes[0]


def test_text_members_by_windows_editors(tmp_path: Path) -> None:
    members: Members = [
        ("0.txt", "\ufeffa red star".encode()),
        ("1.txt", "é".encode("latin-1")),
        ("2.json", b'\xef\xbb\xbf{"text": "b"}'),
    ]
    rows = rows_of(_tar(tmp_path / "in.tar", members), tmp_path / "out", stage="Said", columns={"prompt": "text"})
    assert [(row["status"], row["said"]) for row in rows] == [("ok", "a red star"), ("failed", None), ("ok", "b")]
    assert "1.txt in in.tar" in rows[1]["error"]


def test_a_scan_on_a_store_passes_over_large_members(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    members: Members = [(f"{i}.{kind}", b"x" * size) for i in range(4) for kind, size in (("jpg", 6 << 20), ("txt", 9))]
    buffer, fetched = io.BytesIO(), list[int]()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    fetch = s3fs.core.S3File._fetch_range

    def counted(file: Any, start: int, end: int) -> bytes:
        found: bytes = fetch(file, start, end)
        fetched.append(len(found))
        return found

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    with s3_server() as port:
        options = {"key": "test", "secret": "test", "endpoint_url": f"http://127.0.0.1:{port}"}
        s3fs.S3FileSystem(**options).pipe_file("bucket/in/a.tar", buffer.getvalue())
        source = resolve(Source(("s3://bucket/in",), storage_options=options))
        scan = reader_of(source).scan(source, next(list_files(source)), lambda row: True)
    assert scan.rows == 4
    assert list(scan.offsets.values()) == [i * ((6 << 20) + 3 * 512) for i in range(4)]
    assert sum(fetched) < len(buffer.getvalue()) // 2
