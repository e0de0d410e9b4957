"""What strangers wrote does not speak from the page, nor lead out of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.output.commit import read_summary, write_summary
from pipeline.output.dataset import Output, Tally
from pipeline.output.parquet import handle
from pipeline.output.planfile import own_folder
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


def test_the_card_has_the_commit_of_a_branch(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "fine"}) + "\n")
    spec = spec_of(tmp_path / "in.jsonl", tmp_path / "out")
    run_plain(spec)
    output = Output.open(spec.output)
    output.plan["models"] = {"unet": {"path": "org/name", "revision": "main", "commit": "0123abcd"}}
    assert "| unet | `org/name` | `main` `0123abcd` |\n" in card(output, Tally(ok=1), "0", "title", "what it is")


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


LINKED = ("README.md", "_SUCCESS", "chain.json", "data", "data/part-00000-of-00001.parquet", "_latentmill",
          "_latentmill/plan.json", "_latentmill/files.parquet")  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_of_the_folder_is_followed_by_nobody(tmp_path: Path, name: str) -> None:
    """Before: `push` sent, and a run wrote over, whatever a link in a downloaded folder led to."""
    secret, out = tmp_path / "secret", tmp_path / "out"
    secret.mkdir()
    (secret / "key").write_text("private")
    link = out / name
    link.parent.mkdir(parents=True)
    link.symlink_to(secret if "." not in name and name != "_SUCCESS" else secret / "key")
    below = f"{name}/key" if link.is_dir() else name
    acts = (Folder.read, Folder.open, Folder.size, Folder.exists, Folder.begin, Folder.remove, Folder.listing, handle,
            lambda folder, name: folder.write(name, b"mine"), lambda folder, name: folder.move(name, "x"))  # fmt: skip
    for act in acts:
        with pytest.raises(ValueError, match=f"'{name}' is a link to {secret}.*, which lies outside"):
            act(Folder.at(str(out)), below)
    with pytest.raises(ValueError, match="lies outside"):
        own_folder(Folder.at(str(out))).read(below.removeprefix("_latentmill/") if "_l" in name else "../" + name)
    assert (secret / "key").read_text() == "private"


def test_links_within_a_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real/data").mkdir(parents=True)
    (tmp_path / "real/data/a").write_text("a")
    (tmp_path / "real/b").symlink_to("data/a")
    (tmp_path / "out").symlink_to("real")
    folder = Folder.at(str(tmp_path / "out"))
    assert (folder.read("data/a"), folder.read("b"), folder.listing("data")) == (b"a", b"a", {"a": 1})
