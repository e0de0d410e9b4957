"""Job ``learn-concepts``: a table or folder tree of concepts -> words that any diffusers pipeline can load."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from jobs.page import charts
from jobs.page.html import escape, picture, tag, words
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.concept_input import absolute, allowed, concept_source, folder_of
from jobs.schema.panel import Panel
from pipeline.access import filesystem as filesystem_of
from pipeline.contract import StageSpec, renamed
from stages.concepts.settings import ConceptLearning, LearnConceptsSettings, LegoSettings, Templates
from stages.models.names import FolderName

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.input.source import Source

COLUMNS = ("id", "status", "name", "tokens", "embeddings")
CHECKPOINTS = "_checkpoints"


class Prompts(Templates):
    """Prompts of the training pictures, with ``{subject}`` and ``{concept}``; a row's own replace them."""

    with_: str = Field(Templates().with_, alias="with")
    """Pictures with it."""


class LearnConcepts(RowJob, ConceptLearning):
    """Word embeddings for concepts (adjectives, verbs, relations), learned from a few pictures each through a frozen
    text-to-image model, many concepts in one batch. Method: Lego (Motamed, Paudel and Van Gool, ECCV 2024).

    A row of the input is a concept: ``concept`` (its words), ``subject`` with pictures ``with`` and ``without`` it (or
    ``subjects``, a list), ``positive`` and ``negative`` words for each learned word, ``start``, ``name``. A folder tree
    with a ``concept.yaml`` in each concept's folder serves as well.
    """

    job: Literal["learn-concepts"] = "learn-concepts"
    learning: LegoSettings = LegoSettings()
    prompts: Prompts = Prompts()
    inverter: FolderName | None = Field(None, **renamed("start", to="inverter"))
    """Folder of a trained inverter (job ``train-inverter``) that moves each word to a good start first."""
    pictures_root: FolderName | None = None
    """Folder that relative picture addresses start from. Left out: the folder of the input's first file."""
    shard_rows: int = Field(32, ge=1)
    """Concepts a shard: what one worker takes at a time."""

    def source(self) -> Source:
        return concept_source(self.input)

    def stage(self) -> StageSpec:
        root = folder_of(self.input.path[0]) if self.pictures_root is None else self.pictures_root
        settings = self.part(
            LearnConceptsSettings,
            settings=self.learning,
            templates=self.prompts,
            inverter=self.inverter,
            root=root,
            allow=allowed(self.input, root),
            checkpoints=None if self.output is None else f"{absolute(self.output)}/{CHECKPOINTS}",
        )
        return StageSpec.of("stages.concepts.stage:LearnConcepts", settings)

    products: ClassVar[tuple[str, ...]] = ("concepts",)

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Write a file a word, and drop the checkpoints: the words are committed."""
        widths = self._widths()
        rows = list(ok_rows(finished.tables(list(COLUMNS))))
        for row, folder in zip(rows, folders(rows), strict=True):
            for token, parts in vectors(row, widths):
                for number, part in enumerate(parts):
                    with finished.output.open_file(_file(folder, token, number), "wb") as file:
                        file.write(_safetensors(token, part))
        _drop_checkpoints(finished.output.path)

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        from stages.models.families import read_geometry

        rows = list(ok_rows(finished.tables([*COLUMNS, "phrase", "words", "settings"])))
        if not rows:
            return ""
        usage, output = read_geometry(self).usage, finished.output.path
        row, folder = rows[0], folders(rows)[0]
        tokens, words = json.loads(row["tokens"]), json.loads(row["words"])
        template = json.loads(row["settings"])["templates"]["with_"]
        prompt = " ".join(template.format(subject=words[-1], concept=row["phrase"]).split())  # a line, whoever wrote it
        files = [
            f"pipe.load_textual_inversion({_loaded(f'{output}/{_file(folder, token, number)}')}{_encoder(number)})"
            for token in tokens
            if token in prompt
            for number in range(len(self._widths()))
        ]
        return _CARD.format(
            names=", ".join(usage.names), load=usage.pipeline, files="\n".join(files), output=output,
            prompt=json.dumps(prompt, ensure_ascii=False), asked=shlex.quote(prompt),
            name=row["name"], fetch="import fsspec\n" if "://" in output else "",
            read="from safetensors.torch import load\n" if "://" in output else "",
        )  # fmt: skip

    def _widths(self) -> list[int]:
        """Width of a word in each text encoder."""
        widths: list[int] = json.loads(self.stage().describe().metadata["encoder_widths"])
        return widths

    def panels(self) -> list[Panel]:
        return [
            Panel(
                "Learned concepts", draw_concepts, "Training pictures, then the concept on subjects it has not seen."
            ),
            Panel(
                "Loss and norms", draw_curves, "Means over a window of steps. Norms start at those of ordinary words."
            ),
        ]


_CARD = """## Use the words

Each learned word is a file that diffusers loads as it is:

```python
{fetch}import torch
from diffusers import {names}
{read}
{load}
{files}
pipe({prompt}).images[0].save("concept.png")
```

With SDXL, `learned_embeds.safetensors` is for the first text encoder and `learned_embeds_2.safetensors` for the second.

```sh
latentmill try-concept {output} {name} {asked}     # a sheet with and without the concept
```

"""


def _file(folder: str, token: str, encoder: int) -> str:
    """Where a word's vector for one text encoder lies."""
    name = "learned_embeds.safetensors" if encoder == 0 else f"learned_embeds_{encoder + 1}.safetensors"
    return f"concepts/{folder}/{token.strip('<>')}/{name}"


def _loaded(address: str) -> str:
    """What diffusers is handed for a word's file: it takes paths of this machine, or the tensors themselves."""
    return f'load(fsspec.open("{address}").open().read())' if "://" in address else f'"{address}"'


def _encoder(number: int) -> str:
    """The arguments that hand a word to another text encoder than the first."""
    suffix = f"_{number + 1}"
    return f", text_encoder=pipe.text_encoder{suffix}, tokenizer=pipe.tokenizer{suffix}" if number else ""


def ok_rows(tables: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """The learned concepts of committed tables."""
    for table in tables:
        yield from (row for row in table.to_pylist() if row["status"] == "ok")


def folders(rows: list[dict[str, Any]]) -> list[str]:
    """A folder name a concept: its name, and a mark of its id where two concepts share the name."""
    import hashlib
    from collections import Counter

    count = Counter(row["name"] for row in rows)
    return [
        row["name"]
        if count[row["name"]] == 1
        else f"{row['name']}--{hashlib.blake2b(row['id'].encode(), digest_size=4).hexdigest()}"
        for row in rows
    ]


def vectors(row: Mapping[str, Any], widths: list[int]) -> Iterator[tuple[str, list[Any]]]:
    """Each token of a row with its vector in every encoder, (1, D) float32."""
    import numpy as np

    tokens = json.loads(row["tokens"])
    table = np.asarray(row["embeddings"], dtype=np.float32).reshape(-1, sum(widths))
    ends = np.cumsum(widths)[:-1]
    for token, vector in zip(tokens, table, strict=False):
        yield token, [np.ascontiguousarray(part[None]) for part in np.split(vector, ends)]


def _safetensors(token: str, vector: Any) -> bytes:
    from safetensors.numpy import save

    return save({token: vector})


def _drop_checkpoints(output: str) -> None:
    filesystem, folder = filesystem_of(f"{absolute(output)}/{CHECKPOINTS}")
    if filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)


# --- report


def draw_concepts(view: View) -> Any:
    """Training pictures and samples, concept by concept."""

    columns = ["name", "words", "training", "loss", "steps", *(["samples"] if "samples" in view.columns else [])]
    blocks = []
    for row in view.rows(columns, 24):
        shown = [tag("figure", picture(row["training"], 720, "training pictures"), tag("figcaption", "training"))]
        if row.get("samples"):
            shown.append(tag("figure", picture(row["samples"], 720, "samples"), tag("figcaption", "new subjects")))
        said = f"{', '.join(json.loads(row['words']))} · loss {row['loss']:.4f} after {row['steps']} steps"
        blocks.append(
            [
                tag("h3", words(row["name"], 60)),
                tag("p", words(said), class_="quiet"),
                tag("div", shown, class_="sheets"),
            ]
        )
    return escape(blocks)


def draw_curves(view: View) -> Any:
    """Loss, context loss and norms over the steps, for a few concepts."""

    rows = view.rows(["name", "tokens", "curve"], 8)
    if not rows:
        return ""
    losses, contexts, norms = {}, {}, {}
    for row in rows:
        curve = json.loads(row["curve"])
        steps = [float(point["step"]) for point in curve]
        losses[row["name"]] = (steps, [point["loss"] for point in curve])
        contexts[row["name"]] = (steps, [point["context"] for point in curve])
        for number, token in enumerate(json.loads(row["tokens"])):
            if "-subject-" not in token:
                norms[token] = (steps, [point["norms"][number] for point in curve])
    drawn = [
        charts.lines(losses, "Noise-prediction loss", "steps"),
        charts.lines(contexts, "Context loss", "steps"),
        charts.lines(dict(list(norms.items())[:8]), "Norm of the concept's words", "steps"),
    ]
    return tag("div", [tag("div", chart, class_="cell wide") for chart in drawn], class_="charts")
