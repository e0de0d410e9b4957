"""``latentmill examples``: the shipped job files and their inputs, copied to where one can run and change them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.errors import errors
from jobs.commands.init import EXAMPLES, renamed, subject

_INPUT = re.compile(r"jobs/examples/([\w./-]*\w)")


def examples(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which one; left out: list them.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder to make; left out: one of that name here."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run it too: its dataset and report go to `out` in there.")
    ] = False,
) -> None:
    """Copy a shipped example with its inputs, and run it.

    latentmill examples quickstart --run
    """
    with errors():
        if name is None:
            for known in names():
                typer.echo(f"{known:22}{subject(known)}")
            return
        file = copied(name, folder or Path(name))
        words = ["run-job", str(file), "-o", str(file.parent / "out")]
        typer.echo(f"{file}: latentmill {' '.join(words)}")
    if run:
        # Without -P the folder that we run in would come first on the path.
        raise typer.Exit(subprocess.call([sys.executable, "-P", "-m", "jobs", *words]))


def names() -> list[str]:
    """The shipped job files; the quickstart first."""
    return sorted((file.stem for file in EXAMPLES.glob("*.yaml")), key=lambda name: (name != "quickstart", name))


def copied(name: str, folder: Path) -> Path:
    """Copy an example into a folder; its paths lead there, from whatever working directory. What is there is kept.

    Returns:
        The job file.

    Raises:
        ValueError: There is no such example, or another file of its name.
    """
    from jobs.schema import registry
    from jobs.schema.json_schema import headed, write_schema

    if name not in names():
        raise ValueError(f"no example {name!r}.{registry.nearest(name, names())} There are: {', '.join(names())}.")
    file = folder / f"{name}.yaml"
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    inputs = {found for found in _INPUT.findall(text) if not found.endswith(".yaml")}
    text = headed(renamed(text, str(file)))
    text = _INPUT.sub(lambda match: _quoted(folder.absolute() / match[1]), text)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file} is there already, and changed; name another folder with --output")
    folder.mkdir(parents=True, exist_ok=True)
    for found in inputs:
        _copy(EXAMPLES / found, folder / found)
    file.write_text(text, encoding="utf-8")
    write_schema(folder)
    return file


def _copy(source: Path, target: Path) -> None:
    """With the pictures that a table of the quickstart names beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    shutil.copyfile(source, target)
    for sibling in source.parent.iterdir():
        if sibling.is_dir() and f'"{sibling.name}/' in source.read_text(encoding="utf-8"):
            shutil.copytree(sibling, target.parent / sibling.name, dirs_exist_ok=True)


def _quoted(path: Path) -> str:
    return str(path) if re.fullmatch(r"[\w./~-]+", str(path)) else json.dumps(str(path))
