"""What strangers wrote does not speak from the page, nor lead out of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.output.commit import read_summary, write_summary
from pipeline.output.dataset import Output, Tally
from pipeline.output.publish import card
from pipeline.storage import Folder
from tests.support.faulty import run_plain
from tests.support.plain_stages import spec_of


def test_a_strangers_markup_is_code_in_the_card(tmp_path: Path) -> None:
    """Before: a row's text stood in README.md as it was, so its links and pictures showed on the page of a hub."""
    name = "a`|[b](https://evil.example)"
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "fine", name: "kept"}) + "\n")
    spec = spec_of(tmp_path / "in.jsonl", tmp_path / "out", [name])
    run_plain(spec)
    output = Output.open(spec.output)
    reason = "image: a` [win](https://evil.example)\n\n# Heading\n<img src=x>\u202e"
    tally = Tally(ok=1, failed=2)
    tally._errors.update({reason: 2})
    text = card(output, tally, "0", "title", "what it is")
    assert "- 2 x `image: a' [win](https://evil.example) # Heading <img src=x>`\n" in text
    assert "| `a'\\|[b](https://evil.example)` | string |" in text
    for line in text.splitlines():
        outside = "".join(line.split("`")[::2])
        assert "evil" not in outside
        assert not line.startswith("# Heading")


def test_a_record_cannot_name_what_lies_outside(tmp_path: Path) -> None:
    """Before: a downloaded output's records were followed wherever they led."""
    folder = Folder.at(str(tmp_path / "out"))
    write_summary(Folder.at(str(tmp_path)), "secret", {})
    for name in ("../secret", "data/../../secret", "..", f"{tmp_path}/secret"):
        for act in (folder.read, folder.remove, folder.size, folder.open, lambda n: folder.move(n, "x")):
            with pytest.raises(ValueError, match="lies outside"):
                act(name)
    with pytest.raises(ValueError, match="lies outside"):
        read_summary(folder, "../../../secret")
