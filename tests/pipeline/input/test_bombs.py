"""Small files that want a lot of memory are refused, or fail a row."""

from __future__ import annotations

import gzip
import io
import resource
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jobs.schema.reading import JobFileError, read
from pipeline.input.formats.text import read_lines
from pipeline.input.source import Source, SourceError
from pipeline.run.plan import make_plan
from tests.support.plain_stages import rows_of, spec_of

BOMB = """a: &a [x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]
concept: [*d, *d, *d, *d, *d, *d, *d, *d, *d]
"""


@pytest.mark.parametrize("name", ["in.txt", "in.txt.gz", "in.jsonl.gz", "in.csv", "in.csv.gz"])
def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("pipeline.input.formats.text.LONGEST_LINE", 1 << 20)
    content = b"text\n" + bytes([32]) * (64 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    del content
    tracemalloc.start()
    with pytest.raises(SourceError, match=f"{name}: line . is longer than 1,048,576 bytes"):
        make_plan(spec_of(tmp_path / name, tmp_path / "out"))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_lines_up_to_the_limit_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.input.formats.text.LONGEST_LINE", 8)
    (tmp_path / "in.txt").write_text("1234567\n\n12345678")
    rows = rows_of(tmp_path / "in.txt", tmp_path / "out", shard_rows=2)
    assert [row["length"] for row in rows] == [7, 0, 8]


def _tar(path: Path, members: dict[str, bytes], long: str = "") -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if long:
            tar.addfile(tarfile.TarInfo(long))


def test_a_member_without_end_fails_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.input.formats.webdataset.LONGEST_MEMBER", 1 << 16)
    _tar(tmp_path / "in.tar.gz", {"a.txt": b"fine", "b.txt": bytes(16 << 20), "c.txt": b"too"})
    rows = rows_of(tmp_path / "in.tar.gz", tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "b.txt in in.tar.gz: is longer than 65,536 bytes" in rows[1]["error"]


def test_a_name_without_end_is_refused(tmp_path: Path) -> None:
    _tar(tmp_path / "in.tar", {"a.txt": b"fine"}, long="x" * (2 << 20) + ".txt")
    with pytest.raises(SourceError, match="header of a member is 2,097,157 bytes long"):
        make_plan(spec_of(tmp_path / "in.tar", tmp_path / "out"))


def test_json_nested_without_end_fails_its_row(tmp_path: Path) -> None:
    deep = b"[" * 200_000
    _tar(tmp_path / "in.tar", {"a.json": deep, "a.txt": b"one", "b.txt": b"two"})
    (tmp_path / "in.jsonl").write_bytes(b'{"text": ' + deep + b"\n" + b'{"text": "two"}\n')
    for name in ("in.tar", "in.jsonl"):
        rows = rows_of(tmp_path / name, tmp_path / f"out-{name}")
        assert [row["status"] for row in rows] == ["failed", "ok"]


@pytest.mark.parametrize(("text", "said"), [
    (BOMB, "aliases"), ("concept: &x [*x]\n", "aliases"), ("concept: " + "[" * 50_000, "more than 64 levels deep"),
    ("concept: " + "x" * (1 << 20), "longer than 1,048,576 bytes"),
])  # fmt: skip
def test_yaml_that_grows_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """Before: 394 bytes took 6 GB, and the worker with them."""
    (tmp_path / "in" / "ice").mkdir(parents=True)
    (tmp_path / "in" / "ice" / "concept.yaml").write_text(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (row,) = rows_of(tmp_path / "in", tmp_path / "out", format="concepts")
    assert row["status"] == "failed"
    assert said in row["error"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_job_file_that_holds_itself_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Before: 981 lines of recursion."""
    (tmp_path / "job.yaml").write_text("job: &job [*job]\n")
    with pytest.raises(JobFileError, match="refers to itself"):
        read(tmp_path / "job.yaml")


@pytest.mark.parametrize("name", ["in.txt", "in.txt.gz"])
def test_a_store_s_files_have_the_same_limit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """fsspec's own files take no limit for a line; lines are the same, from any byte on."""
    monkeypatch.setattr("pipeline.input.formats.text.LONGEST_LINE", 8)
    content = b"1234567\n\n12345678"
    with fsspec.open(f"memory://bombs/{name}", "wb") as file:
        file.write(gzip.compress(content) if name.endswith("gz") else content)
    source = Source((f"memory://bombs/{name}",))
    assert list(read_lines(source, source.path[0], 0)) == [b"1234567\n", b"\n", b"12345678"]
    assert list(read_lines(source, source.path[0], 8)) == [b"\n", b"12345678"]
    monkeypatch.setattr("pipeline.input.formats.text.LONGEST_LINE", 7)
    with pytest.raises(SourceError, match="line 1 is longer than 7 bytes"):
        list(read_lines(source, source.path[0], 0))


def _header(shape: str, said: str = "<f8") -> bytes:
    """A file of numpy's that promises an array, and holds none of it."""
    told = f"{{'descr': '{said}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told


ARRAYS = {
    "more than there is": _header("(1000000, 4)"),
    "more than a machine counts": _header(f"(0, {10**20})"),
    "less than nothing": _header("(-1, -4)"),
    "an archive": b"PK\x03\x04 of nothing",
    "no bytes": b"",
    "objects": _header("(1, 1)", "|O"),
    "no header": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
}


def test_arrays_that_are_none_fail_their_rows(tmp_path: Path) -> None:
    """Before: three of these ended the run with a traceback."""
    members = {f"{number}.npy": content for number, content in enumerate(ARRAYS.values())}
    good = io.BytesIO()
    np.save(good, np.ones(4))
    texts = {f"{number}.txt": b"words" for number in range(len(ARRAYS) + 1)}
    _tar(tmp_path / "in.tar", dict(sorted({**members, f"{len(ARRAYS)}.npy": good.getvalue(), **texts}.items())))
    rows = rows_of(tmp_path / "in.tar", tmp_path / "out", keep={"npy": "npy"})
    assert [row["status"] for row in rows] == ["failed"] * len(ARRAYS) + ["ok"], [row["error"] for row in rows]
    assert all(".npy file" in row["error"] for row in rows[:-1])


@pytest.mark.parametrize("name", [*ARRAYS, "rows of nothing", "as many rows as wrap around"])
def test_a_file_of_arrays_that_are_none_is_refused(tmp_path: Path, name: str) -> None:
    """Before: a header of 2**62 rows of 4 was planned, since numpy's product of them is 0."""
    more = {"rows of nothing": _header(f"({10**12}, 0)"), "as many rows as wrap around": _header(f"({2**62}, 4)")}
    (tmp_path / "in.npy").write_bytes((ARRAYS | more)[name])
    with pytest.raises(SourceError, match=r"in\.npy: (is no \.npy file|needs a C-ordered|is cut short|holds)"):
        make_plan(spec_of(tmp_path / "in.npy", tmp_path / "out"))
