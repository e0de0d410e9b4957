"""``import latentmill``: light, whole, the same things as where they live, and open to type checkers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import latentmill
from tests.support import ROOT
from tests.support.imports import PACKAGES

HEAVY = ("torch", "ray", "datasets", "diffusers", "transformers", "faiss")


def loaded_by(code: str) -> set[str]:
    """Top names that a fresh process has loaded after some code."""
    told = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; {told}"]
    return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def test_importing_it_loads_nothing_and_using_its_names_nothing_heavy() -> None:
    assert not loaded_by("import latentmill") & {*HEAVY, "pydantic", "numpy", "pyarrow", "jobs", "pipeline"}
    assert not loaded_by("from latentmill import *") & set(HEAVY)


def test_every_name_is_what_it_says_and_type_checkers_see_the_same() -> None:
    assert dir(latentmill) == sorted(latentmill.__all__)
    assert latentmill.__version__ == version("latentmill")
    for name, home in latentmill._HOMES.items():
        module, _, own = home.partition(":")
        assert getattr(latentmill, name) is getattr(sys.modules[module], own)
    tree = ast.parse(Path(str(latentmill.__file__)).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == latentmill._HOMES
    assert {*seen, "__version__"} == set(latentmill.__all__)


def test_a_folder_of_the_users_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Python looks where it was started first."""
    (tmp_path / "pipeline").mkdir()
    for name in ("pipeline/__init__.py", "jobs.py", "index.py", "stages.py"):
        (tmp_path / name).write_text("raise RuntimeError('the user\\'s own')\n")
    command = [sys.executable, "-c", "import sys; sys.path.append({!r}); {}"]
    use = "import latentmill; latentmill.open_dataset; import pipeline.machine; assert '' in sys.path"
    for code, said in ((use, ""), ("sys.modules['pipeline'] = sys; " + use, "give yours another name")):
        run = [*command[:2], command[2].format(str(ROOT), code)]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (said == ""), done.stderr
        assert said in done.stderr


def test_a_name_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'run_jobs'; it has .*run_job"):
        latentmill.run_jobs  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
