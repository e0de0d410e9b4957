"""Both distributions of a release from one checkout: ``python scripts/release.py`` (``make wheels``).

``latentmill`` holds all packages but ``micro``; ``latentmill-micro`` holds that one: the miniature models, their world
and their prompts. Both have the version of the tag on the checked-out commit (``v1.2.0``), without one that of
pyproject.toml. Only files under version control are built, each
distribution from a folder of its own, so that what lies about in the checkout gets into neither.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = "micro"
MINIATURE_NEEDS = ("diffusers", "numpy", "pillow", "safetensors", "torch", "transformers")
"""Requirements of the project that the package ``micro`` imports."""
SUMS = "SHA256SUMS"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files; emptied first")
    parser.add_argument("--sign", metavar="KEY", help="GPG key that signs the checksums")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        for source in staged(Path(work)):
            build(source, given.out, "--sdist", "--wheel")
    files = sorted(given.out.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    sums = given.out / SUMS
    sums.write_text("".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files))
    if given.sign:
        subprocess.run(["gpg", "--armor", "--detach-sign", "--local-user", given.sign, str(sums)], check=True)
    for file in sorted(given.out.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file}")


def tracked() -> list[str]:
    """Files under version control, or, in an unpacked archive, all there are."""
    if (ROOT / ".git").exists():
        return [name for name in _git("ls-files").splitlines() if (ROOT / name).is_file()]
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]


def staged(work: Path) -> tuple[Path, Path]:
    """Make the sources of both distributions in a folder: of ``latentmill``, and of ``latentmill-micro``."""
    files, project = tracked(), _versioned((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    main, small = work / "latentmill", work / "latentmill-micro"
    inside = [name for name in files if name.startswith(f"{MINIATURE}/")]
    _copy(sorted({*files} - {*inside}), main)
    _copy([*inside, "LICENSE"], small)
    (main / "pyproject.toml").write_text(_pinned(project), encoding="utf-8")
    (small / "pyproject.toml").write_text(_miniature(project), encoding="utf-8")
    return main, small


def _versioned(project: str) -> str:
    """The project's file with the version that a tag on the commit names, if one does.

    Raises:
        SystemExit: Two tags do, or one that is no version, or files differ from the tagged ones.
    """
    tags = _git("tag", "--points-at", "HEAD", "--list", "v[0-9]*").split() if (ROOT / ".git").exists() else []
    if not tags:
        return project
    if len(tags) > 1:
        raise SystemExit(f"the commit has the tags {', '.join(tags)}: which version is it? Delete all but one")
    try:
        version = str(Version(tags[0]))
    except InvalidVersion:
        raise SystemExit(f"the tag {tags[0]} is no version: v1.2.0, v1.2.0rc1 ...") from None
    if changed := _git("status", "--porcelain", "--untracked-files=no"):
        raise SystemExit(f"the commit is {tags[0]}, and the checkout is not: commit or undo\n{changed}")
    own = f'version = "{tomllib.loads(project)["project"]["version"]}"\n'
    return project.replace(own, f'version = "{version}"\n', 1)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _copy(names: Iterable[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def _pinned(project: str) -> str:
    """The project's file, with the extra that brings the other distribution at the same version."""
    loose = '["latentmill-micro"]'
    if project.count(loose) != 1:
        raise SystemExit(f"pyproject.toml: expected one extra {loose}")
    return project.replace(loose, f'["latentmill-micro=={tomllib.loads(project)["project"]["version"]}"]')


def _miniature(project: str) -> str:
    """The project's file of ``latentmill-micro``: version, licence and ranges are the other's."""
    own = tomllib.loads(project)
    known = {Requirement(text).name: text for text in own["project"]["dependencies"]}
    told = {key: own["project"][key] for key in ("version", "requires-python", "license", "license-files")}
    told |= {
        "name": "latentmill-micro",
        "description": "A miniature world with trained miniature models, for latentmill's quickstart and tests",
        "readme": f"{MINIATURE}/README.md",
        "dependencies": [known[name] for name in MINIATURE_NEEDS],
    }
    data = own["tool"]["setuptools"]["package-data"]
    return "\n".join(
        [
            "[build-system]",
            *_lines(own["build-system"]),
            "[project]",
            *_lines(told),
            "[tool.setuptools]",
            *_lines({"packages": [MINIATURE]}),
            "[tool.setuptools.package-data]",
            *_lines({MINIATURE: [*data["*"], *data[MINIATURE]]}),
            "",
        ]
    )


def _lines(table: dict[str, object]) -> list[str]:
    """Strings and lists of strings in TOML are what they are in JSON."""
    return [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]


def build(source: Path, out: Path, *options: str) -> None:
    """Build a staged distribution. Files carry the date of the commit: the same commit gives the same wheels.

    Args:
        options: Of ``python -m build``.
    """
    stamp = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    dated = {"SOURCE_DATE_EPOCH": stamp.stdout.strip()} if stamp.stdout.strip() else {}
    command = [sys.executable, "-m", "build", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, env={**os.environ, **dated}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source.name} could not be built:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
