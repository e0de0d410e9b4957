"""Job ``learn-concepts``: a table or folder tree of concepts -> words that any diffusers pipeline can load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

import micro
from jobs.schema.base import JobBase
from jobs.schema.concept_input import absolute, concept_source, folder_of
from jobs.schema.panel import Panel
from pipeline.contract import Settings, StageSpec
from stages.models.names import ModelName

if TYPE_CHECKING:
    import pipeline.run.driver
    from jobs.page.view import View
    from pipeline.input.source import Source

COLUMNS = ("id", "status", "name", "tokens", "embeddings")
CHECKPOINTS = "_checkpoints"


class Learning(Settings):
    """How words are learned. The paper publishes none of these numbers."""

    steps: int = Field(3000, ge=1)
    """Most steps a concept makes; a multiple of `window`."""
    pictures: int = Field(4, ge=1)
    """Pictures a concept and step, half of them without the concept."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate of AdamW, on the new words alone."""
    separation: bool = True
    """Subject separation. Off: only pictures with the concept, as in textual inversion."""
    context: Literal["paper", "normalised", "none"] = "normalised"
    """Form of the context loss: raw dot products, cosines over a temperature (ReVersion's), or none."""
    context_weight: float = Field(0.01, ge=0)
    """Weight of the context loss."""
    temperature: float = Field(0.07, gt=0)
    """Of the normalised form."""
    skew: float = Field(0.0, ge=0, le=1)
    """Draw noisy timesteps more often: 0 is uniform, ReVersion's importance sampling is 0.5."""
    window: int = Field(100, ge=1)
    """Steps over which losses are averaged for the curve and for stopping."""
    tolerance: float = Field(0.0, ge=0)
    """Smallest gain of a window's loss, as a share, that counts as progress."""
    patience: int | None = Field(None, ge=1)
    """Windows without progress after which a concept stops. Left out: all steps are made."""

    @model_validator(mode="after")
    def _fits(self) -> Learning:
        if self.steps % self.window:
            raise ValueError(f"steps ({self.steps}) is no multiple of window ({self.window})")
        if self.separation and self.pictures % 2:
            raise ValueError(f"pictures ({self.pictures}) is odd: half of them show the subject without the concept")
        return self


class Prompts(Settings):
    """Prompts of the training pictures, with ``{subject}`` and ``{concept}``; a row's own replace them."""

    without: str = "Photo of a {subject}"
    """Pictures without the concept."""
    with_: str = Field("Photo of a {subject} that is {concept}", alias="with")
    """Pictures with it."""
    plain: str = "Photo of a {concept}"
    """Pictures with it, when there is no subject separation."""


class SampleSettings(Settings):
    """Pictures of each learned concept on new subjects, for the report."""

    subjects: tuple[str, ...] = Field(min_length=1)
    """Nouns that take the subject's place."""
    prompt: str | None = None
    """With ``{subject}`` and ``{concept}``; the concept's own prompt when left out."""
    count: int = Field(2, ge=1)
    """Pictures a subject."""
    steps: int = Field(30, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=1)
    """Guidance scale."""


class LearnConcepts(JobBase):
    """Word embeddings for concepts (adjectives, verbs, relations), learned from a few pictures each through a frozen
    text-to-image model, many concepts in one batch. Method: Lego (Motamed, Paudel and Van Gool, ECCV 2024).

    A row of the input is a concept: ``concept`` (its words), ``subject`` with pictures ``with`` and ``without`` it (or
    ``subjects``, a list), ``positive`` and ``negative`` words for each learned word, ``start``, ``name``. A folder tree
    with a ``concept.yaml`` in each concept's folder serves as well.
    """

    job: Literal["learn-concepts"] = "learn-concepts"
    model: ModelName = str(micro.MODELS / "stable-diffusion")
    """Stable Diffusion 1.x, 2.x or XL: a diffusers folder or hub id. Left out: the miniature one."""
    revision: str | None = None
    """Of the hub repository."""
    variant: str | None = None
    """Of the weight files, for instance ``fp16``."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the frozen networks; words and optimiser are float32."""
    device: str = "auto"
    """``cpu``, ``cuda``, ... ``auto`` takes the GPU where there is one."""
    size: int | None = Field(None, ge=8)
    """Side of the training pictures in pixels; the model's own when left out."""
    learning: Learning = Learning()
    prompts: Prompts = Prompts()
    samples: SampleSettings | None = None
    """Left out: no sample pictures."""
    start: str | None = None
    """Folder of a trained inverter (job ``train-inverter``) that moves each word to a good start first."""
    slots: int = Field(8, ge=1)
    """Concepts in one batch; each brings `learning.pictures` pictures a step."""
    max_words: int = Field(4, ge=1)
    """Most new words a concept has, subjects included: the height of the column ``embeddings``."""
    pictures_root: str | None = None
    """Folder that relative picture addresses start from. Left out: the folder of the input's first file."""
    checkpoint_seconds: float = Field(120.0, ge=0)
    """A killed worker loses at most so much of the concepts in flight."""
    shard_rows: int = Field(32, ge=1)
    """Concepts a shard: what one worker takes at a time."""

    def source(self) -> Source:
        return concept_source(self.input)

    def stage(self) -> StageSpec:
        return StageSpec(
            "stages.concepts.stage:LearnConcepts",
            {
                "model": self.model,
                "revision": self.revision,
                "variant": self.variant,
                "dtype": self.dtype,
                "device": self.device,
                "size": self.size,
                "settings": self.learning.model_dump(),
                "templates": self.prompts.model_dump(by_alias=False),
                "samples": None if self.samples is None else self.samples.model_dump(),
                "inverter": self.start,
                "slots": self.slots,
                "max_words": self.max_words,
                "seed": self.seed,
                "root": folder_of(self.input.path[0]) if self.pictures_root is None else self.pictures_root,
                "checkpoints": None if self.output is None else f"{absolute(self.output)}/{CHECKPOINTS}",
                "checkpoint_seconds": self.checkpoint_seconds,
            },
        )

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Write a file a word, and drop the checkpoints: the words are committed."""
        widths = json.loads(self.stage().describe().metadata["encoder_widths"])
        rows = list(ok_rows(finished.tables(list(COLUMNS))))
        for row, folder in zip(rows, folders(rows), strict=True):
            for token, parts in vectors(row, widths):
                for number, part in enumerate(parts):
                    name = "learned_embeds.safetensors" if number == 0 else f"learned_embeds_{number + 1}.safetensors"
                    with finished.output.open_file(f"concepts/{folder}/{token.strip('<>')}/{name}", "wb") as file:
                        file.write(_safetensors(token, part))
        _drop_checkpoints(finished.output.path)

    def card(self) -> str:
        return _CARD

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
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(MODEL)
pipe.load_textual_inversion("OUT/concepts/frozen-in-ice/frozen-in-ice-1/learned_embeds.safetensors")
pipe.load_textual_inversion("OUT/concepts/frozen-in-ice/frozen-in-ice-2/learned_embeds.safetensors")
pipe("photo of a heart that is <frozen-in-ice-1> in <frozen-in-ice-2>").images[0]
```

With SDXL, load `learned_embeds.safetensors` for the first text encoder and `learned_embeds_2.safetensors` for the
second (`text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2`). `latentmill try-concept OUT frozen-in-ice
"photo of a heart that is <cpt-1> in <cpt-2>"` draws a sheet with and without the concept.

"""


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
    import fsspec

    filesystem, folder = fsspec.core.url_to_fs(f"{absolute(output)}/{CHECKPOINTS}")
    if filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)


# --- report


def draw_concepts(view: View) -> Any:
    """Training pictures and samples, concept by concept."""
    from jobs.page.html import escape, picture, tag, words

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
    from jobs.page import charts
    from jobs.page.html import tag

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
