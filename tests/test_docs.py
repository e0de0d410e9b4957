"""What the pages name is there: paths, modules, classes and functions of ours."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TOPS = "latentmill|jobs|pipeline|stages|micro|tests|benchmarks"
PATH = re.compile(rf"(?<![\w/.:-])((?:{TOPS}|index|docs)/[\w./-]*\w)(?![\w<*/{{-])")
NAME = re.compile(rf"(?<![\w/.-])((?:{TOPS})(?:\.[A-Za-z_]\w*)+)")


def missing(text: str) -> list[str]:
    """Names in the text that stand for nothing."""
    paths = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    names = {name for name in NAME.findall(text) if not name.endswith((".yaml", ".md", ".py", ".jsonl", ".parquet"))}
    return sorted(paths | {name for name in names if not is_there(name)})


def is_there(name: str) -> bool:
    """Whether a dotted name leads to a package, a module, or something that a module defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        if length == len(parts) and place.is_dir():
            return True
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            return defines(ast.parse(file.read_text(encoding="utf-8")).body, parts[length:])
    return False


def defines(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == names[0]:
            return defines(node.body, names[1:])
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
                return True
        if isinstance(node, ast.If) and defines(node.body, names):  # for type checkers
            return True
        if isinstance(node, ast.ImportFrom) and names[0] in {alias.asname or alias.name for alias in node.names}:
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_name_on_a_page_leads_somewhere(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def test_figures_that_are_summed_up_stand_where_they_were_measured() -> None:
    names = ("exact.md", "inversion.md", "ovi.md")
    exact, *measured = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in names)
    figures = set(re.findall(r"\d\d\.\d\d\b|\.\d{3}\b", exact))
    assert len(figures) >= 20
    assert {figure for figure in figures if figure not in "".join(measured)} == set()


def test_names_that_lead_nowhere_are_found() -> None:
    text = "`jobs/run.py`, `jobs/walk.py`, `jobs.run.run_job`, `jobs.run.walk_job`, jobs.run.JobResult.data, jobs.walk"
    assert missing(text) == ["jobs.run.walk_job", "jobs.walk", "jobs/walk.py"]
    assert missing("`latentmill.run_job`, `latentmill.walk_job`, micro.MODELS") == ["latentmill.walk_job"]
