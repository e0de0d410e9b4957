"""Records of files that one process makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import record
from pipeline.storage import Folder


def _commit(folder: Path, content: bytes, facts: dict[str, Any]) -> dict[str, Any]:
    draft = folder / "file.tmp"
    draft.write_bytes(content)
    return record.commit(draft, folder / "file", facts)


def test_a_file_counts_with_its_record_and_for_its_facts_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert record.read(path, {}) is None
    made = _commit(tmp_path, b"content", {"of": "a", "rows": 3})
    assert (made["bytes"], record.read(path, {"of": "a"})) == (7, made)
    assert record.read(path, {"of": "b"}) is None
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "file.json"]
    path.write_bytes(b"CONTENT")
    assert record.read(path, {"of": "a"}) is None
    path.unlink()
    assert record.read(path, {"of": "a"}) is None


def test_a_crash_before_the_record_leaves_no_record_of_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _commit(tmp_path, b"old", {"of": "a"})

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        _commit(tmp_path, b"new", {"of": "a"})
    assert (tmp_path / "file").read_bytes() == b"new"
    assert record.read(tmp_path / "file", {}) is None
