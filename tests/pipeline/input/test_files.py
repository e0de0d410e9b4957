"""Which files of a folder or a glob are read, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.input.files import list_files, resolve
from pipeline.input.source import Source, SourceError


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
