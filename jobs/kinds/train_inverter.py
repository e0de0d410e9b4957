"""Jobs ``train-inverter`` (prompts -> a module that reads text latents off pictures) and ``invert-text`` (its use)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

import micro
from jobs.schema.base import JobBase
from jobs.schema.panel import Panel
from pipeline.contract import Settings, StageSpec
from stages.models.names import ModelName

if TYPE_CHECKING:
    import pipeline.run.driver
    from jobs.page.view import View

CHECKPOINT = "_checkpoints/inverter.safetensors"
MEASURES = "inverter/measures.json"
FOLDER = "inverter"


class ModelJob(JobBase):
    """A job around one frozen Stable Diffusion model."""

    model: ModelName = str(micro.MODELS / "stable-diffusion")
    """Stable Diffusion 1.x, 2.x or XL: a diffusers folder or hub id. Left out: the miniature one."""
    revision: str | None = None
    """Of the hub repository."""
    variant: str | None = None
    """Of the weight files, for instance ``fp16``."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the frozen networks."""
    device: str = "auto"
    """``cpu``, ``cuda``, ... ``auto`` takes the GPU where there is one."""
    size: int | None = Field(None, ge=8)
    """Side of the pictures in pixels; the model's own when left out."""
    batch: int = Field(16, ge=1)
    """Pictures in one pass."""

    def model_params(self) -> dict[str, Any]:
        """What every stage around the model takes."""
        names = ("model", "revision", "variant", "dtype", "device", "size", "batch")
        return {name: getattr(self, name) for name in names}


class Network(Settings):
    """The inverter's size."""

    patch: int = Field(2, ge=1)
    """Side of a patch, in latent pixels."""
    width: int = Field(256, ge=8)
    """Width of the transformer."""
    layers: int = Field(6, ge=1)
    """Its layers."""
    heads: int = Field(8, ge=1)
    """Its attention heads."""


class Training(Settings):
    """How the inverter is trained."""

    steps: int = Field(10_000, ge=1)
    """Optimiser steps."""
    batch: int = Field(64, ge=1)
    """Pictures in each."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    noise_weight: float = Field(0.1, ge=0)
    """Weight of the noise-prediction loss under the inverted text latent."""
    noise_rows: int = Field(16, ge=0)
    """Pictures of each batch that it is measured on; 0 turns it off."""
    held_out: float = Field(0.05, gt=0, lt=1)
    """Share of the pictures kept for the final measures."""


class TrainInverter(ModelJob):
    """Pictures drawn from known prompts by a frozen text-to-image model, and a latent inversion module trained on them
    that gives back a picture's text latent in one pass.

    Rows need a column ``prompt``. The pictures are drawn by the workers; the module is trained where the command runs,
    when the last shard is committed.
    """

    job: Literal["train-inverter"] = "train-inverter"
    steps: int = Field(30, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=1)
    """Guidance scale of the pictures."""
    network: Network = Network()
    training: Training = Training()
    checkpoint_seconds: float = Field(120.0, ge=0)
    """Training that is killed loses at most so much."""

    def stage(self) -> StageSpec:
        params = self.model_params() | {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}
        return StageSpec("stages.inverter.model:DrawPairs", params)

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Train the inverter on what the workers drew."""
        import tempfile

        from stages.inverter.model import InverterShape, InverterTraining, text_conditions, train_inverter
        from stages.models.unet import LatentDiffusion, read_geometry

        target = finished.output.path.rstrip("/")
        geometry = read_geometry(self.model, revision=self.revision, size=self.size)
        model = LatentDiffusion.load(
            self.model, revision=self.revision, variant=self.variant, dtype=self.dtype, device=_device(self.device)
        )
        text, pooled = text_conditions(model, [""], geometry.size)
        shape = InverterShape(
            latent=geometry.latent_shape,
            text=(text.shape[1], text.shape[2]),
            pooled=0 if pooled is None else pooled.shape[1],
            **self.network.model_dump(),
        )
        with tempfile.TemporaryDirectory() as scratch:
            pairs = gather(finished, geometry.latent_shape, f"{scratch}/latents")
            inverter, measures = train_inverter(
                model,
                pairs,
                shape,
                InverterTraining(**self.training.model_dump()),
                size=geometry.size,
                seed=self.seed,
                checkpoint=f"{target}/{CHECKPOINT}",
                checkpoint_seconds=self.checkpoint_seconds,
            )
        inverter.save(f"{target}/{FOLDER}")
        with finished.output.open_file(MEASURES, "wb") as file:
            file.write(json.dumps(measures, indent=2).encode())

    def card(self) -> str:
        return _CARD

    def panels(self) -> list[Panel]:
        return [
            Panel("Inverter", draw_training, "Error in units of the text latents' variance: 1 for the mean latent.")
        ]


class InvertText(ModelJob):
    """Text latents of pictures, read off by a trained inverter in one pass each: a condition without a caption.

    Rows need a column ``image``. The column ``text_latent`` is what the model's text encoder would have given.
    """

    job: Literal["invert-text"] = "invert-text"
    inverter: str
    """Output folder of a ``train-inverter`` job on the same model."""
    image: str = "image"
    """Column with the picture."""

    def stage(self) -> StageSpec:
        params = self.model_params() | {"inverter": self.inverter, "image": self.image}
        return StageSpec("stages.inverter.model:InvertText", params)


_CARD = """## Use the inverter

```python
from stages.inverter.model import TextInverter

inverter = TextInverter.load("OUT/inverter")
text_latent, pooled = inverter(latents)   # scaled VAE latents (B, C, H, W) -> what the text encoder would have given
pipe(prompt_embeds=text_latent, negative_prompt_embeds=empty).images
```

The job `invert-text` writes the text latents of a dataset of pictures; `invert-images` takes the folder as `inverter:`
in place of captions, `learn-concepts` as `start:`.

"""


def gather(finished: pipeline.run.driver.Finished, latent: tuple[int, int, int], path: str) -> Any:
    """All pairs with status ok: latents in a memory map on local disk, prompts in a list."""
    import numpy as np
    import pyarrow.compute as pc

    from stages.inverter.model import Pairs

    prompts: list[str] = []
    with open(path, "wb") as file:
        for table in finished.tables(["status", "prompt", "latent"]):
            good = table.filter(pc.equal(table.column("status"), "ok"))
            prompts += good.column("prompt").to_pylist()
            for chunk in good.column("latent").chunks:
                file.write(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).tobytes())
    if not prompts:
        raise ValueError("no picture was drawn, so there is nothing to train on: see the failed rows")
    return Pairs(np.memmap(path, dtype=np.float16, mode="r", shape=(len(prompts), *latent)), prompts)


def _device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def draw_training(view: View) -> Any:
    """The training curve and the measures on held-out pictures."""
    from jobs.page import charts
    from jobs.page.html import escape, table, tag

    with view.output.open_file(MEASURES, "rb") as file:
        measures = json.loads(file.read())
    curve = measures.pop("curve")
    steps = [float(point["step"]) for point in curve]
    rows = [[name.replace("_", " "), charts.number(value)] for name, value in measures.items()]
    chart = charts.lines({"error": (steps, [point["error"] for point in curve])}, "Error of the text latent", "steps")
    return escape([table(["Measure", "Value"], rows, numeric=(1,)), tag("div", chart, class_="cell wide")])
