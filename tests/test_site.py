"""Pages have their place in mkdocs.yml, lead to files, and are Markdown that MkDocs reads as a code host does.

`make docs` checks the rest (anchors, names of the reference); this needs no MkDocs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "micro" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ITEM = re.compile(r"( *)(?:[-*]|\d+\.) ")


def places(entry: Any) -> list[str]:
    """The files that a navigation names."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [place for part in parts for place in places(part)]


def dead_links(page: Path) -> list[str]:
    links = {link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if ":" not in link}
    return sorted(link for link in links if link and not (page.parent / link).exists())


def ill_formed(text: str) -> list[str]:
    """Lines that MkDocs reads otherwise than a code host: it begins and ends lists and tables at empty lines alone."""
    found, before, fenced = [], "", False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.startswith("```")
        item, was_item = ITEM.match(line), ITEM.match(before)
        row, was_row = line.startswith("|"), before.startswith("|")
        if fenced or line.startswith("    ") or line.startswith("```"):
            before = "" if fenced else line
            continue
        if before and row != was_row and line:
            found.append(f"line {number}: an empty line has to part a table from the text around it")
        if before and item and not was_item and not before.startswith(" "):
            found.append(f"line {number}: an empty line has to come before a list")
        if item and 0 < len(item[1]) < 4:
            found.append(f"line {number}: a list in a list has to be indented by four spaces")
        before = line
    return found


def test_every_page_is_in_the_navigation() -> None:
    named = set(places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    missing = sorted({page.relative_to(DOCS).as_posix() for page in PAGES} - named)
    assert not missing, f"give these pages of docs/ a line under `nav` in mkdocs.yml: {missing}"
    gone = sorted(name for name in named if not (DOCS / name).exists() and not (ROOT / name).exists())
    assert not gone, f"`nav` in mkdocs.yml names what is not there: {gone}"


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_lists_are_lists_everywhere(page: Path) -> None:
    assert dead_links(page) == []
    assert ill_formed(page.read_text(encoding="utf-8")) == []


def test_what_mkdocs_would_read_otherwise_is_found() -> None:
    assert ill_formed("text\n\n- one\n- two\n  goes on\n- three\n\n| a |\n|---|\n\n```\ntext\n- no list\n```\n") == []
    said = ill_formed("text\n- one\n  - in it\n\ntext\n| a |\n|---|\ntext\n")
    assert [line.partition(":")[0] for line in said] == ["line 2", "line 3", "line 6", "line 8"]
