"""Two stages around an inverter: prompts to the pictures it is trained on, and pictures to text latents.

Legend: B pictures, C H W latents, T text positions, K width of the text condition, P width of SDXL's pooled condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pipeline.contract import Column, Row, StageInfo, failed, ok
from stages.engine.passthrough import in_batches
from stages.engine.randomness import row_generator
from stages.inverter.model import TextInverter
from stages.inverter.settings import BatchSettings, DrawPairsSettings, InvertTextSettings
from stages.models.families import open_latent_model, read_geometry
from stages.models.pictures import encode_pictures, to_picture


class _Batched:
    """What the two share: a frozen model, and a batch that halves when the device runs out of memory."""

    def __init__(self, settings: BatchSettings) -> None:
        self.model = open_latent_model(settings)
        self.rooms, self._batch = self.model.rooms, settings.batch_size

    @property
    def batch(self) -> int:
        """Rows at once."""
        return min(self._batch, self.rooms["rows"].rows)

    def shrink(self) -> bool:
        """Half the batch, after the device ran out of memory."""
        return self.rooms["rows"].halve(self.batch)


class DrawPairs(_Batched):
    """Prompts -> pictures that the frozen model draws of them, with the latents an inverter is trained on."""

    known_as = "stages.text_inverter:DrawPairs"
    Settings = DrawPairsSettings

    def __init__(self, settings: DrawPairsSettings) -> None:
        super().__init__(settings)
        self.settings = settings

    @staticmethod
    def describe(settings: DrawPairsSettings) -> StageInfo:
        geometry = read_geometry(settings)
        geometry.refuse_flow("text latents are read for the noise-prediction models' CLIP alone")
        return StageInfo(
            columns=(
                Column("prompt", "string", doc="what the picture was drawn from"),
                Column("image", "image"),
                Column("latent", "tensor", geometry.latent_shape, "float16", doc="the picture encoded again, scaled"),
            ),
            models=geometry.fingerprints(),
            metadata={"vae_scaling_factor": str(geometry.scaling_factor)},
            reads={"prompt": "text"},
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return in_batches(map(_with_prompt, rows), self.batch, self._draw)

    @torch.no_grad()
    def _draw(self, rows: list[Row]) -> Iterator[Row]:
        guidance = self.settings.guidance
        condition = self.model.condition([row["prompt"] for row in rows], guided=guidance > 1)
        generators = [row_generator(self.settings.seed, row["id"], "picture") for row in rows]
        z_BCHW = self.model.draw(condition, steps=self.settings.steps, guidance=guidance, generators=generators)
        pictures = [to_picture(x_CHW) for x_CHW in self.model.decode(z_BCHW).cpu()]
        encoded_BCHW = encode_pictures(self.model, pictures).cpu()
        for row, picture, latent_CHW in zip(rows, pictures, encoded_BCHW, strict=True):
            yield ok(row, image=picture, latent=latent_CHW.numpy())


def _with_prompt(row: Row) -> Row:
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return row
    return failed(row, "the prompt is empty; give one in the column 'prompt'")


class InvertText(_Batched):
    """Pictures -> text latents, one pass of a trained inverter each."""

    known_as = "stages.text_inverter:InvertText"
    Settings = InvertTextSettings

    def __init__(self, settings: InvertTextSettings) -> None:
        super().__init__(settings)
        self.inverter = TextInverter.load(settings.inverter, self.model.device)
        self.image = settings.image

    @staticmethod
    def describe(settings: InvertTextSettings) -> StageInfo:
        """Columns of the text latents.

        Raises:
            ValueError: There is no inverter in the folder, or it was trained for pictures of another size.
        """
        geometry = read_geometry(settings)
        geometry.refuse_flow("text latents are read for the noise-prediction models' CLIP alone")
        return StageInfo(
            columns=text_columns(settings.inverter, geometry.latent_shape),
            models=geometry.fingerprints(),
            metadata={"inverter": settings.inverter},
            reads={settings.image: "picture"},
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return in_batches(map(self._with_picture, rows), self.batch, self._invert)

    def _with_picture(self, row: Row) -> Row:
        if row.get(self.image) is not None:
            return row
        return failed(row, f"image: no picture in the column {self.image!r}")

    @torch.no_grad()
    def _invert(self, rows: list[Row]) -> Iterator[Row]:
        z_BCHW = encode_pictures(self.model, [row[self.image] for row in rows])
        text_BTK, pooled_BP = self.inverter(z_BCHW)
        for number, row in enumerate(rows):
            pooled = {} if pooled_BP is None else {"pooled": pooled_BP[number].cpu().numpy()}
            yield ok(row, text_latent=text_BTK[number].cpu().numpy(), **pooled)


def text_columns(inverter: str, latent_shape: tuple[int, int, int]) -> tuple[Column, ...]:
    """Columns of the text latents that an inverter reads off pictures.

    Args:
        inverter: Its folder.
        latent_shape: Of the model that the pictures are encoded with.

    Raises:
        ValueError: There is no inverter in the folder, or it was trained for pictures of another size.
    """
    shape = TextInverter.load(inverter).shape
    if latent_shape != shape.latent:
        raise ValueError(
            f"the inverter in {inverter} reads latents of {shape.latent}, this model and size give {latent_shape}: "
            "train one for it, or set size"
        )
    text = Column("text_latent", "tensor", shape.text, "float16", doc="the text encoder's output, inverted")
    pooled = Column("pooled", "tensor", (shape.pooled,), doc="SDXL's pooled condition")
    return (text, *([pooled] if shape.pooled else []))
