"""The wheel holds what runs need beside the code, and nothing that belongs to the checkout alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def tracked() -> list[str]:
    """Files under version control, or, in an unpacked archive, all that lie in the packages."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [name for name in listing.splitlines() if (ROOT / name).is_file()]
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel that is built from a copy of the tracked files."""
    work = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        target = work / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", code, str(work)], cwd=work / "source", capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(work / built.stdout.split()[-1]) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_all_modules_and_data_are_in_the_wheel(wheel: list[str]) -> None:
    inside = set(wheel)
    folders = ("latentmill/", "jobs/", "pipeline/", "stages/", "index/")
    ends = (".py", ".yaml", ".css", ".js", ".html", "py.typed")
    wanted = {name for name in tracked() if name.startswith(folders) and name.endswith(ends)}
    wanted |= {name for name in tracked() if re.match(r"micro/(models|prompts)/|micro/[^/]*\.py$", name)}
    assert wanted
    assert not wanted - inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


@pytest.mark.slow
def test_nothing_else_is_in_the_wheel(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel if ".dist-info" not in name}
    assert tops == {"latentmill", "jobs", "pipeline", "stages", "index", "micro"}


def test_requirements_admit_the_pinned_versions() -> None:
    """The constraints are one point inside the ranges: what the tests run on is what users may have."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (x.partition("==") for x in lines) if version}
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["cpu"], *extras["test"], *extras["s3"], *extras["docs"]]:
        requirement = Requirement(text)
        if requirement.name == "latentmill":
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    assert pins["torch"] == "2.13.0"
    torch = next(Requirement(text) for text in project["dependencies"] if text.startswith("torch>"))
    for build in ("2.13.0+cpu", "2.13.0+cu130", "2.12.1"):
        assert torch.specifier.contains(build)


def test_citation_and_licence_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert citation["version"] == project["version"]
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    titles = " ".join(reference["title"] for reference in citation["references"])
    for word in ("Optimization-based Visual Inversion", "Cross the Gap", "Latent Bias", "Lego", "ReNoise", "Kandinsky"):
        assert word in titles
