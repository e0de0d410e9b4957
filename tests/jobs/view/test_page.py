"""The page in a real browser, where there is one."""

from __future__ import annotations

import html
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from jobs.view.server import Server
from tests.jobs.view.conftest import HOSTILE

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_shows_rows_a_row_and_a_comparison(server: Server, tmp_path: Path) -> None:
    rows = shown(server, tmp_path, 'filters=[{"column":"method","op":"in","value":["lbo","another"]}]&row="1-5"')
    assert "row-00000105" in rows
    assert "load_dataset" in rows
    assert "<svg" in rows
    everything = shown(server, tmp_path, "")
    assert html.escape(HOSTILE[:-1], quote=False) in everything.replace("&quot;", '"')
    assert "\u202e" not in everything
    assert "taken</title>" not in everything
    assert "<b>600</b> of 600 rows" in everything
    compared = shown(server, tmp_path, 'compare={"a":"many","b":"other","show":"any"}')
    assert "in b alone" in compared
    assert "row-00000001" in compared


def shown(server: Server, folder: Path, state: str) -> str:
    """The document after the scripts have run."""
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser",
        "--virtual-time-budget=20000", "--dump-dom", f"{server.url}#{quote(state, safe='=&')}",
    ]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout
    except subprocess.TimeoutExpired:
        pytest.skip("the browser did not end in time: the machine is busy")
