"""The wheels hold what runs need beside the code, and nothing that belongs to the checkout alone; and they work."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from scripts import release
from tests.support import ROOT
from tests.support.imports import PACKAGES

OURS = {
    "latentmill": ("latentmill/", "jobs/", "pipeline/", "stages/", "index/"),
    "latentmill_micro": ("micro/",),
}
"""Distribution -> the packages that it holds."""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, built from the tracked files as a release is, but without a network."""
    work = tmp_path_factory.mktemp("wheels")
    for source in release.staged(work):
        release.build(source, work / "dist", "--wheel", "--no-isolation")
    return {file.name.partition("-")[0]: file for file in (work / "dist").iterdir()}


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with little in it, of a commit that is to be tagged."""
    root = tmp_path / "checkout"
    (root / "micro").mkdir(parents=True)
    for name in ("pyproject.toml", "LICENSE"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "micro/__init__.py").touch()
    monkeypatch.setattr(release, "ROOT", root)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=root, check=True)


@pytest.mark.parametrize(("tag", "version"), [("v7.1.0", "7.1.0"), ("v7.1.0-rc1", "7.1.0rc1"), (None, None)])
def test_a_tag_names_the_version(tagged: Path, tmp_path: Path, tag: str | None, version: str | None) -> None:
    version = version or tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag:
        git(tagged, "tag", tag)
    projects = [tomllib.loads((source / "pyproject.toml").read_text())["project"] for source in
                release.staged(tmp_path / "work")]  # fmt: skip
    assert [project["version"] for project in projects] == [version] * 2
    assert projects[0]["optional-dependencies"]["micro"] == [f"latentmill-micro=={version}"]


def test_a_tag_that_says_something_else_is_refused(tagged: Path, tmp_path: Path) -> None:
    git(tagged, "tag", "v7.1.0")
    (tagged / "LICENSE").write_text("another")
    with pytest.raises(SystemExit, match=r"v7\.1\.0, and the checkout is not"):
        release.staged(tmp_path / "work")
    git(tagged, "tag", "v7.2.0")
    with pytest.raises(SystemExit, match=r"tags v7\.1\.0, v7\.2\.0"):
        release.staged(tmp_path / "work")
    git(tagged, "tag", "--delete", "v7.1.0", "v7.2.0")
    git(tagged, "tag", "v1-final")
    with pytest.raises(SystemExit, match="v1-final is no version"):
        release.staged(tmp_path / "work")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
@pytest.mark.parametrize("distribution", OURS)
def test_a_wheel_holds_its_modules_and_data_and_nothing_else(wheels: dict[str, Path], distribution: str) -> None:
    assert set(wheels) == set(OURS)
    inside, folders = names(wheels[distribution]), OURS[distribution]
    ends = (".py", ".yaml", ".css", ".js", ".html", "py.typed")
    wanted = {name for name in release.tracked() if name.startswith(folders) and name.endswith(ends)}
    if distribution == "latentmill_micro":
        wanted |= {name for name in release.tracked() if re.match(r"micro/(models|prompts)/", name)}
    assert wanted
    assert not wanted - inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert {name.partition("/")[0] + "/" for name in inside if ".dist-info" not in name} == set(folders)


@pytest.mark.slow
def test_both_wheels_are_one_release(wheels: dict[str, Path]) -> None:
    """One version, the extra pins it, and the miniature one asks for what it imports in the ranges of the other."""
    told = {}
    for distribution, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            told[distribution] = message_from_bytes(archive.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {message["Version"] for message in told.values()} == {project["version"]}
    needs = told["latentmill"].get_all("Requires-Dist")
    assert f'latentmill-micro=={project["version"]}; extra == "micro"' in needs
    extras = {"gpu", "cpu", "s3", "gcs", "azure", "hub", "slurm", "view", "lora", "metrics", "micro"}
    assert extras <= set(told["latentmill"].get_all("Provides-Extra")), "pip warns of one that it does not find"
    small = {Requirement(text) for text in told["latentmill_micro"].get_all("Requires-Dist")}
    assert small <= {Requirement(text) for text in needs}
    assert imported("micro") - {module(one) for one in small} <= MAKERS


MAKERS = {"skimage"}
"""What those who train the miniature models import, from a checkout."""
CHOSEN = {"mlflow", "wandb", "timm", "torchvision"}
"""Where a job or an option names them: the user's own installation is used, and a sentence says that it is lacking."""


def imported(*packages: str) -> set[str]:
    """Top names of the libraries that packages import, wherever the imports stand."""
    found = set()
    for file in (file for package in packages for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {*PACKAGES, "_typeshed"}


def module(requirement: Requirement) -> str:
    """The module that a distribution brings."""
    own = {"pillow": "PIL", "pyyaml": "yaml", "faiss-cpu": "faiss", "faiss-gpu": "faiss"}
    return own.get(requirement.name.lower(), requirement.name.replace("-", "_"))


def test_what_is_imported_is_asked_for() -> None:
    """By name, and not because another library happens to bring it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = {name: extras[name] for name in extras.keys() - {"test", "release", "dev", "docs"}}
    asked = {
        module(Requirement(text)) for text in [*project["dependencies"], *(t for one in users.values() for t in one)]
    }
    assert imported(*PACKAGES) - MAKERS - CHOSEN - {"pydantic_core"} <= asked  # pydantic's own


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_installed_from_wheels_the_quickstart_is_planned_in_an_empty_folder(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    """No checkout on any path. Without the miniature models, one sentence says what to install."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = str(tmp_path / "venv/bin/python")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (here := tmp_path / "empty").mkdir()

    def install(distribution: str) -> None:
        options = ["--quiet", "--no-deps", "--no-index", "--no-compile"]
        pip = [sys.executable, "-m", "pip", "--python", python, "install", *options]
        unled = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a checkout on it counts
        subprocess.run([*pip, str(wheels[distribution])], check=True, env=unled)

    def latentmill(*words: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "200"}
        command = [str(tmp_path / "venv/bin/latentmill"), *words]
        return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)

    install("latentmill")
    others = site / "others.pth"  # the libraries that the tests run with; what their own .pth files add does not count
    others.write_text(sysconfig.get_path("purelib") + "\n")
    copied = latentmill("examples", "quickstart")
    assert copied.returncode == 0, copied.stderr
    plan = ("run-job", "quickstart/quickstart.yaml", "-o", "out", "--dry-run")
    refused = latentmill(*plan)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    line = r'quickstart\.yaml, line 13: .*encoder: the miniature .* not installed: pip install "latentmill\[micro\]"'
    assert re.search(line, refused.stderr), refused.stderr
    others.unlink()
    install("latentmill_micro")
    others.write_text(sysconfig.get_path("purelib") + "\n")
    planned = latentmill(*plan)
    assert planned.returncode == 0, planned.stderr
    assert {file.name for file in here.iterdir()} == {"quickstart"}


def test_requirements_admit_the_pinned_versions() -> None:
    """The constraints are one point inside the ranges: what the tests run on is what users may have."""
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
