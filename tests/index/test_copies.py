"""References on remote storage: whoever asks at the same time, each file is fetched once and never written again."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from index.copies import local_copy
from index.reference import find
from pipeline.storage import checksum

FILES = ("vectors.npy", "rows.arrow", "index.faiss")


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reference on a store, and a temporary folder without copies."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    fs = fsspec.filesystem("memory")
    fs.rm("/copies", recursive=True) if fs.exists("/copies") else None
    for number, name in enumerate(FILES):
        content = bytes([number]) * 100_000
        (tmp_path / name).write_bytes(content)
        fs.pipe_file(f"/copies/out/reference/{name}", content)
    with (tmp_path / FILES[0]).open("rb") as handle:
        record = {"bytes": 100_000, "checksum": checksum(handle)}
    fs.pipe_file(f"/copies/out/reference/{FILES[0]}.json", json.dumps(record).encode())
    fs.pipe_file("/copies/out/reference/reference.json", b'{"rows": 2}')
    return "memory://copies/out"


def test_many_that_open_it_at_once_share_one_copy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to fetch truncated the files that the first had mapped."""
    got: list[str] = []
    real = MemoryFileSystem.get_file

    def slow(self: Any, remote: str, local: str, **rest: Any) -> None:
        got.append(remote)
        with open(local, "wb"):
            time.sleep(0.05)
        real(self, remote, local, **rest)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    seen: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: seen.append(np.memmap(find(address) / FILES[2], mode="r"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 6
    assert all((view == 2).all() and view.size == 100_000 for view in seen)
    assert len(got) == len(set(got)) == 4
    find(address)
    assert len(got) == 4
    assert [path for path in local_copy(address).iterdir() if path.suffix == ".part"] == []


def test_a_new_version_gets_a_copy_of_its_own(address: str) -> None:
    first = find(address)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/copies/out/reference/{FILES[1]}", b"new")
    fs.pipe_file("/copies/out/reference/reference.json", b'{"rows": 3}')
    second = find(address)
    assert (second / FILES[1]).read_bytes() == b"new"
    assert (first / FILES[1]).read_bytes() == bytes([1]) * 100_000


def test_what_was_cut_or_changed_on_its_way_is_not_kept(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MemoryFileSystem.get_file

    def cut(self: Any, remote: str, local: str, **rest: Any) -> None:
        real(self, remote, local, **rest)
        if remote.endswith(FILES[1]):
            Path(local).write_bytes(Path(local).read_bytes()[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", cut)
        with pytest.raises(OSError, match=r"rows\.arrow: 99999 of 100000 bytes were fetched"):
            find(address)
    assert [path.suffix for path in local_copy(address).iterdir()] == [".lock"]
    fsspec.filesystem("memory").pipe_file(f"/copies/out/reference/{FILES[0]}", bytes(100_000 - 1) + b"x")
    with pytest.raises(OSError, match=r"vectors\.npy: its bytes are not those that were committed"):
        find(address)
    fsspec.filesystem("memory").pipe_file(f"/copies/out/reference/{FILES[0]}", bytes(100_000))
    assert sorted(path.name for path in find(address).iterdir()) == sorted(
        [*FILES, "reference.json", "vectors.npy.json"]
    )


def test_what_a_killed_process_left_is_cleared_away(address: str) -> None:
    copy = find(address)
    (copy / "reference.json").unlink()
    (copy / FILES[1]).write_bytes(b"half")
    part = copy.with_name(f"{copy.name}.0.part")
    part.mkdir()
    assert (find(address) / FILES[1]).read_bytes() == bytes([1]) * 100_000
    assert not part.exists()


def test_there_is_none(address: str) -> None:
    with pytest.raises(FileNotFoundError, match="no finished reference at memory://copies/else"):
        find("memory://copies/else")


def test_a_link_that_leads_out_of_a_reference_is_not_followed(tmp_path: Path) -> None:
    """Before: `search` showed the rows of whatever a link in a folder of a stranger's led to."""
    (tmp_path / "out/reference").mkdir(parents=True)
    (tmp_path / "out/reference/reference.json").write_text("{}")
    assert find(tmp_path / "out") == find(tmp_path / "out/reference") == tmp_path / "out/reference"
    (tmp_path / "rows.arrow").write_bytes(b"")
    (tmp_path / "out/reference/rows.arrow").symlink_to(tmp_path / "rows.arrow")
    for path in ("out", "out/reference"):
        with pytest.raises(ValueError, match=r"rows\.arrow' is a link to .*, which lies outside"):
            find(tmp_path / path)
