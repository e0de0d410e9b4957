"""``latentmill init``: a commented job file of a kind, to be edited."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.errors import errors

EXAMPLES = Path(__file__).parents[1] / "examples"
SD15, KANDINSKY = "stable-diffusion-v1-5/stable-diffusion-v1-5", "kandinsky-community/kandinsky-2-2-prior"
SMOLVLM = "HuggingFaceTB/SmolVLM-500M-Instruct"

TEMPLATES = {
    "reference": "reference",
    "invert-prompts": "ovi-kandinsky22",
    "decode": "decode-kandinsky22",
    "caption": "caption",
    "invert-images": "invert-sd15",
    "learn-concepts": "lego-sd15",
    "rare-concepts": "rare-concepts-sd15",
    "select-corpus": "select-corpus",
    "judge-corpus": "judge-corpus",
    "train-inverter": "train-inverter-sd15",
    "invert-text": "invert-text-sd15",
    "chain": "chain-kandinsky22",
}
"""Kind -> the shipped job file that is its template."""
MODELS = {
    "sd15": SD15,
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "kandinsky22": KANDINSKY,
}
"""Short name -> hub id."""
OWN_TEMPLATES = {("invert-images", "sdxl"): "invert-sdxl"}


def init(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Of job; left out: list them.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help=f"{', '.join(MODELS)}; or any folder or hub id. Left out: the template's."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write; - prints it.")] = Path(
        "job.yaml"
    ),
) -> None:
    """Write a commented job file to start from."""
    with errors():
        if kind is None:
            for line in listing():
                typer.echo(line)
            return
        from jobs.schema.json_schema import headed, write_schema

        text = headed(template(kind, model, output.name if output.name != "-" else "job.yaml"))
        if str(output) == "-":
            typer.echo(text, nl=False)
            return
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ValueError(f"{output} is there already; name another file with --output") from None
        write_schema(output.parent)
    typer.echo(f"{output}: say what `input` is, and look through the rest; then")
    typer.echo(f"  latentmill doctor {output}")
    typer.echo(f"  latentmill run-job {output} -o out --dry-run")


def listing() -> list[str]:
    """A line a kind: its name, what it reads and writes."""
    return [f"{kind:16}{subject(name)}" for kind, name in TEMPLATES.items()]


def subject(name: str) -> str:
    """What a shipped job file is about: the first sentence of its comment, up to a colon."""
    lines = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines[:4] if not line.startswith("# yaml-language-server:")]
    text = " ".join(line.removeprefix("#").strip() for line in lines[:3] if line.startswith("#"))
    return re.split(r"[.:](?: |$)", text)[0]


def renamed(text: str, name: str) -> str:
    """A shipped job file whose comments speak of it by another name."""
    shipped = "|".join(re.escape(file.name) for file in EXAMPLES.glob("*.yaml"))
    return re.sub(rf"(?<![\w/-])(?:jobs/examples/)?(?:{shipped})", lambda match: name, text)


def template(kind: str, model: str | None, name: str) -> str:
    """The job file of a kind for a model.

    Args:
        name: What the file will be called, for its comments.

    Raises:
        ValueError: There is no such kind, or its jobs take no such model.
    """
    from jobs.schema import registry

    if kind not in TEMPLATES:
        raise ValueError(registry.unknown_kind(kind, TEMPLATES))
    own = OWN_TEMPLATES.get((kind, model or ""))
    text = (EXAMPLES / f"{own or TEMPLATES[kind]}.yaml").read_text(encoding="utf-8")
    text = renamed(text, name)
    if model is None or own:
        return text
    default = next((one for one in (SD15, KANDINSKY, SMOLVLM) if one in text), None)
    if default is None:
        raise ValueError(f"{kind} works with no such model: leave out --model")
    fitting = {SD15: ["sd15", "sd21", "sdxl"], KANDINSKY: ["kandinsky22"], SMOLVLM: []}[default]
    if model in MODELS and model not in fitting:
        known = f"{', '.join(fitting)}, or " if fitting else ""
        raise ValueError(f"{kind} takes no {model}: {known}a folder or hub id of such a model")
    value = MODELS.get(model, model)
    plain = value if re.fullmatch(r"[\w./:~-]+", value) else json.dumps(value)
    text = text.replace(default, plain)
    if model == "sdxl":
        text = re.sub(r"^(model: \S+)(.*)$", r"\1\2\nvariant: fp16", text, flags=re.MULTILINE)
    return text
