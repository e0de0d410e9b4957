"""Notebooks run from top to bottom and hold what they print, numbers apart: another processor rounds otherwise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.in_process import without_ray
from tests.support.notebooks import cells, run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def masked(text: str) -> str:
    return re.sub(r"\s*\d+(\.\d+)*", " #", text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_and_holds_what_it_prints(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    without_ray(monkeypatch)
    code = cells(notebook)
    assert code
    for cell, (said, _) in zip(code, run(code), strict=True):
        kept = [line for output in cell["outputs"] for line in output.get("text", ())]
        assert masked("".join(kept)) == masked(said)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_one_and_small(notebook: Path) -> None:
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert notebook.stat().st_size < 60_000
    links = re.findall(r"\]\((\.\./[^)#]+)", notebook.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (notebook.parent / link).exists()] == []
