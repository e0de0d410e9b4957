"""A folder: what one process lists while others write in it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Folder


def test_a_file_that_goes_while_a_folder_is_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files come and go: whoever commits a record makes one, and renames it."""
    (tmp_path / "records").mkdir()
    for i in range(20):
        (tmp_path / f"records/{i:06d}.json").write_text("{}")
    (tmp_path / "records/.a.tmp").write_text("{}")
    real = os.scandir

    def scandir(path: Any) -> Any:
        with real(path) as found:
            entries = list(found)
        (tmp_path / "records/.a.tmp").unlink()
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(Folder.at(str(tmp_path)).listing("records")) == [f"{i:06d}.json" for i in range(20)]
    monkeypatch.setattr(os, "scandir", real)
    assert Folder.at(str(tmp_path)).listing("nothing") == {}
