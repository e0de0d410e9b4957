"""``latentmill try-concept``: a sheet of pictures without a learned concept and with it, from the same noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from jobs.commands.errors import errors
from jobs.commands.stores import StorageOptions, reaching


def try_concept(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a learn-concepts run.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The concept's name.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='For instance "photo of a heart that is <cpt-1>".')],
    sheet: Annotated[str, typer.Option("--sheet", "-o", metavar="FILE", help="Picture to write.")] = "sheet.png",
    without: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Prompt without the concept; left out: yours without its words."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures of each.")] = 4,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Sampling steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=1, metavar="X", help="Guidance scale.")] = 7.5,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same noise is used with and without.")] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model to draw with; left out: the one it was learned on.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, ...; auto takes the GPU where there is one.")
    ] = "auto",
    storage_options: StorageOptions = None,
) -> None:
    """Draw prompts without and with a learned concept.

    A sheet: above without it, below with it, from the same noise.
    """
    from jobs.kinds.learn_concepts import COLUMNS, ok_rows
    from pipeline.output.dataset import Output

    with errors(), reaching(out, storage_options):
        opened = Output.open(out)
        rows = list(ok_rows(opened.tables(list(COLUMNS))))
        plain, path = draw_sheet(
            rows, opened.plan["config"], name, prompt, sheet=sheet, without=without, count=count, steps=steps,
            guidance=guidance, seed=seed, model=model, device=device,
        )  # fmt: skip
    typer.echo(f"{path}: above {plain!r}, below {prompt!r}")


def draw_sheet(
    rows: list[dict[str, Any]],
    config: Mapping[str, Any],
    name: str,
    prompt: str,
    *,
    sheet: str,
    without: str | None,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    model: str | None,
    device: str,
) -> tuple[str, str]:
    """Draw and save the sheet of `try_concept`; returns the prompt without the concept and the file's name.

    Raises:
        ValueError: No such concept, or the prompt does not use its words.
    """
    import numpy as np
    import torch

    from stages.concepts.samples import concept_tokens, generate, load_learned, without_concept
    from stages.concepts.samples import sheet as page
    from stages.models.families import open_latent_model
    from stages.models.settings import LatentModelSettings

    row = load_learned(rows, name)
    words = json.loads(row["tokens"])
    text = concept_tokens(prompt, row["name"], words)
    plain = without or without_concept(text)
    learned_on = {name: config[name] for name in LatentModelSettings.model_fields if name in config}
    others = ("revision", "scheduler", "vae", "config", "loras", "words")  # given for the model that it was learned on
    own = {"model": model, **dict.fromkeys(others)} if model else {}
    opened = open_latent_model(LatentModelSettings(**learned_on | own | {"device": device}))
    table = np.asarray(row["embeddings"], dtype=np.float32)
    table = table.reshape(-1, sum(opened.geometry.word_widths))[: len(words)]
    pictures = generate(
        opened,
        [plain] * count + [text] * count,
        words,
        torch.from_numpy(table),
        seeds=[seed + number for number in range(count)] * 2,
        steps=steps,
        guidance=guidance,
    )
    page(pictures, columns=count).save(sheet)
    return plain, sheet
