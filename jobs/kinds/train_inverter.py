"""Jobs ``train-inverter`` (prompts -> a module that reads text latents off pictures) and ``invert-text`` (its use)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jobs.page import charts
from jobs.page.html import escape, table, tag
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec, speed
from stages.inverter.settings import DrawPairsSettings, InvertTextSettings, Network, Training

if TYPE_CHECKING:
    import pipeline.run.driver

CHECKPOINT = "_checkpoints/inverter.safetensors"
MEASURES = "inverter/measures.json"
FOLDER = "inverter"


class TrainInverter(RowJob, DrawPairsSettings):
    """Pictures drawn from known prompts by a frozen text-to-image model, and a latent inversion module trained on them
    that gives back a picture's text latent in one pass.

    Rows need a column ``prompt``. The pictures are drawn by the workers; when the last shard is committed the module is
    trained by one of them, or where the command runs if that started Ray itself.
    """

    job: Literal["train-inverter"] = "train-inverter"
    network: Network = Network()
    training: Training = Training()
    checkpoint_seconds: float = speed(120.0, ge=0)
    """Training that is killed loses at most so much."""

    def stage(self) -> StageSpec:
        return StageSpec.of("stages.inverter.stage:DrawPairs", self.part(DrawPairsSettings))

    products: ClassVar[tuple[str, ...]] = (FOLDER,)
    finish_apart: ClassVar[bool] = True

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Train the inverter on what the workers drew."""
        import tempfile

        from stages.inverter.model import InverterShape
        from stages.inverter.training import text_conditions, train_inverter
        from stages.models.families import open_latent_model

        target = finished.output.path.rstrip("/")
        model = open_latent_model(self)
        text, pooled = text_conditions(model, [""])
        shape = InverterShape(
            latent=model.geometry.latent_shape,
            text=(text.shape[1], text.shape[2]),
            pooled=0 if pooled is None else pooled.shape[1],
            **self.network.model_dump(),
        )
        with tempfile.TemporaryDirectory() as scratch:
            pairs = gather(finished, model.geometry.latent_shape, f"{scratch}/latents")
            inverter, measures = train_inverter(
                model,
                pairs,
                shape,
                self.training,
                seed=self.seed,
                checkpoint=f"{target}/{CHECKPOINT}",
                checkpoint_seconds=self.checkpoint_seconds,
            )
        inverter.save(f"{target}/{FOLDER}")
        with finished.output.open_file(MEASURES, "wb") as file:
            file.write(json.dumps(measures, indent=2).encode())

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        from pipeline.output.publish import loading
        from stages.models.families import read_geometry

        geometry = read_geometry(self)
        usage = geometry.usage
        return _CARD.format(
            names=", ".join(usage.names), load=usage.pipeline, output=finished.output.path,
            rows=loading(finished.output),
            shape=", ".join(map(str, geometry.latent_shape)), steps=self.steps,
            given=", ".join(f"{argument}={name}" for argument, (name, _) in usage.text_latent.items()),
        )  # fmt: skip

    def panels(self) -> list[Panel]:
        return [
            Panel("Inverter", draw_training, "Error in units of the text latents' variance: 1 for the mean latent.")
        ]


class InvertText(RowJob, InvertTextSettings):
    """Text latents of pictures, read off by a trained inverter in one pass each: a condition without a caption.

    Rows need a column ``image``. The column ``text_latent`` is what the model's text encoder would have given.
    """

    job: Literal["invert-text"] = "invert-text"

    def stage(self) -> StageSpec:
        return StageSpec.of("stages.inverter.stage:InvertText", self.part(InvertTextSettings))


_CARD = """## Use the inverter

```python
import torch
from datasets import load_dataset
from diffusers import {names}
from stages.inverter.model import TextInverter

rows = {rows}
row = next(row for row in rows if row["status"] == "ok")
inverter = TextInverter.load("{output}/inverter")
latent = torch.tensor(row["latent"]).reshape(1, {shape})  # of a picture, scaled
text_latent, pooled = inverter(latent)                    # what the text encoder would have given
{load}
pipe({given}, num_inference_steps={steps}, guidance_scale=1.0).images[0].save("again.png")
```

The job `invert-text` writes the text latents of a dataset of pictures; `invert-images` takes the folder as `inverter:`
in place of captions, `learn-concepts` as `start:`.

"""


def gather(finished: pipeline.run.driver.Finished, latent: tuple[int, int, int], path: str) -> Any:
    """All pairs with status ok: latents in a memory map on local disk, prompts in a list."""
    import numpy as np
    import pyarrow.compute as pc

    from stages.inverter.training import Pairs

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


def draw_training(view: View) -> Any:
    """The training curve and the measures on held-out pictures."""

    with view.output.open_file(MEASURES, "rb") as file:
        measures = json.loads(file.read())
    curve = measures.pop("curve")
    steps = [float(point["step"]) for point in curve]
    rows = [[name.replace("_", " "), charts.number(value)] for name, value in measures.items()]
    chart = charts.lines({"error": (steps, [point["error"] for point in curve])}, "Error of the text latent", "steps")
    return escape([table(["Measure", "Value"], rows, numeric=(1,)), tag("div", chart, class_="cell wide")])
