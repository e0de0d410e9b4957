"""What lies beside a tar: the index that DALI's wds2idx writes, and what img2dataset leaves of a shard."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.files import list_files, resolve
from pipeline.input.formats import webdataset
from pipeline.input.read import reader_of, scanned_again
from pipeline.input.rows import FileScan, Span
from pipeline.input.source import Source, SourceError
from pipeline.run.draft import draft
from pipeline.run.plan import check_input, make_plan, write_plan
from pipeline.storage import Folder
from tests.support.plain_stages import rows_of, spec_of


def shard(folder: Path, count: int = 200, failed: Iterable[int] = (), mtime: float = 1700000000.25) -> Path:
    """A shard of img2dataset: tar, Parquet and statistics. Its tar writer (webdataset's) writes the time with a
    fraction, for which pax needs a header of its own before each member."""
    rows = {"key": list[str](), "status": list[str](), "caption": list[str](), "url": list[str]()}
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(count):
            key, done = f"{number:09d}", number not in failed
            rows["key"].append(key)
            rows["status"].append("success" if done else "failed_to_download")
            rows["caption"].append(f"no {number}")
            rows["url"].append(f"https://example.org/{number}.jpg")
            said = {name: values[-1] for name, values in rows.items()}
            members = {"jpg": b"x" * (number % 7), "json": json.dumps(said).encode(), "txt": b"no %d" % number}
            for extension, content in members.items() if done else ():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(content), mtime  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": count, "successes": count}))
    return folder / "00000.tar"


def index(tar: Path) -> Path:
    """Its index, as DALI's documentation has it: a line a sample, of each component extension, offset, size, name."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
    lines = [f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples.values())]
    path = tar.with_suffix(".idx")
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def scan(path: Path, **others: Any) -> tuple[Source, FileScan]:
    source = resolve(Source((str(path),), **others))
    return source, reader_of(source).scan(source, next(list_files(source)), lambda row: row % 64 == 0)


def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise AssertionError("the tar is read through")

    monkeypatch.setattr(webdataset, "_read_through", refused)


def test_an_index_spares_reading_the_tar_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = shard(tmp_path, failed=[3, 70])
    source, plain = scan(tar)
    every = list(reader_of(source).rows(source, Span("00000.tar", str(tar), 0, plain.rows), None))
    index(tar)
    with monkeypatch.context() as patch:
        _unread(patch)
        _, found = scan(tar)
    assert (found.rows, found.keys, found.notes) == (198, plain.keys, plain.notes)
    assert (found.digest, plain.also) == (plain.also, found.digest)
    for row, offset in found.offsets.items():  # an entry by the index reads what reading from the start does
        span = Span("00000.tar", str(tar), row, min(row + 5, 198), offset)
        assert list(reader_of(source).rows(source, span, None)) == every[row : row + 5]
    assert list(found.offsets) == [0, 64, 128, 192]


def test_a_plan_made_either_way_knows_the_tar_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tar = shard(tmp_path / "in")
    source, plain = scan(tar)
    file = next(list_files(source))
    beside = index(tar)
    listed = scan(tar)[1]
    for digest, there in ((plain.digest, True), (plain.digest, False), (listed.digest, True), (listed.digest, False)):
        beside.unlink(missing_ok=True)
        if there:
            index(tar)
        assert scanned_again(source, file, digest, 200)[1]
    shard(tmp_path / "in", count=199)
    index(tar)
    assert not scanned_again(source, replace(file, size=tar.stat().st_size), plain.digest, 200)[1]
    shard(tmp_path / "in")
    beside.unlink()
    spec = spec_of(tar, tmp_path / "out", stage="Said", columns={"prompt": "txt"})
    folder = Folder.at(str(tmp_path / "out/_latentmill"))
    write_plan(spec, draft(spec), folder, 0.0)
    index(tar)
    tar.touch()
    assert check_input(source, folder, None) == {}


@pytest.mark.parametrize("change", ["another tar", "cut", "longer", "one renamed"])
def test_an_index_of_another_tar_is_refused_by_name(tmp_path: Path, change: str) -> None:
    tar = shard(tmp_path)
    index(tar)
    (tmp_path / "00000.parquet").unlink()
    if change == "another tar":
        shard(tmp_path, failed=range(0, 200, 2))
    elif change == "cut":
        tar.write_bytes(tar.read_bytes()[:100_000])
    elif change == "longer":
        shard(tmp_path, count=205)
    else:
        tar.write_bytes(tar.read_bytes().replace(b"000000199.txt", b"000000299.txt"))
    (tmp_path / "00000.parquet").unlink(missing_ok=True)
    with pytest.raises(SourceError, match=r"00000\.idx: is not the index of .*00000\.tar; make it anew"):
        scan(tar)


def test_an_index_that_is_cut_is_refused_and_one_that_tells_too_little_is_left_aside(tmp_path: Path) -> None:
    tar = shard(tmp_path)
    path = index(tar)
    whole = path.read_text()
    path.write_text(whole[:1000])
    with pytest.raises(SourceError, match=r"00000\.idx: is cut or damaged"):
        scan(tar)
    plain = scan(tar.rename(tmp_path / "1.tar"))[1]
    (tmp_path / "1.tar").rename(tar)
    for other in (whole.replace("v1.2", "v1.1"), "some other tool's\n", "", whole.replace("jpg", "a jpg")):
        path.write_text(other)
        found = scan(tar)[1]
        assert (found.digest, found.offsets) == (plain.digest, plain.offsets)


def test_links_and_long_names_are_not_left_to_an_index(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as opened:
        for name in ("0.txt", f"{'long' * 40}.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            opened.addfile(info, io.BytesIO(b"abc"))
            if name == "0.txt":
                link = tarfile.TarInfo("1.txt")
                link.type, link.linkname = tarfile.SYMTYPE, "0.txt"
                opened.addfile(link)
    path = index(tar)
    path.write_text("v1.2 2\n" + "\n".join(line for line in path.read_text().splitlines()[1:] if "1.txt 1" not in line
                                           and not line.endswith("1.txt")) + "\n")  # fmt: skip
    found = scan(tar)[1]
    assert found.keys == ("a.tar/0", f"a.tar/{'long' * 40}")
    assert "1 links are left out" in found.notes[0]


def test_a_folder_of_img2dataset_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shard(tmp_path / "in", count=6, failed=[2])
    rows = rows_of(tmp_path / "in", tmp_path / "out", stage="Said", columns={"prompt": "caption"}, keep=["url"])
    assert [(row["id"], row["said"]) for row in rows] == [
        (f"00000.tar/{number:09d}", f"no {number}") for number in (0, 1, 3, 4, 5)
    ]
    assert rows[0]["url"] == "https://example.org/0.jpg"


def test_a_tar_that_lacks_what_its_parquet_lists_is_refused(tmp_path: Path) -> None:
    tar = shard(tmp_path, count=20)
    with tarfile.open(tar) as opened:
        cut = next(member.offset for member in opened if member.name == "000000015.jpg")
    tar.write_bytes(tar.read_bytes()[:cut] + b"\0" * 1024)  # as if the disk had been full
    with pytest.raises(SourceError, match=r"00000\.parquet: lists 20 pictures as downloaded, .*00000\.tar holds 15"):
        make_plan(spec_of(tar, tmp_path / "out", stage="Said", columns={"prompt": "txt"}))
    pq.write_table(pa.table({"key": ["1"], "score": [0.5]}), tmp_path / "00000.parquet")  # another's
    assert scan(tar)[1].rows == 15
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(SourceError, match=r"00000\.parquet: is no Parquet file"):
        scan(tar)
