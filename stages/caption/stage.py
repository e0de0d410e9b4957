"""The stage of `caption`: a picture in, what it shows in words out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from pipeline.contract import Column, Row, StageInfo, failed, ok
from stages.caption.captioner import Caption, Captioner, PictureRefused
from stages.caption.prompts import Prompter
from stages.caption.settings import Captioning, CaptionSettings
from stages.engine.device import chosen_device, exact_float32
from stages.engine.passthrough import in_batches
from stages.engine.room import Rooms
from stages.models.clip import ModelError
from stages.models.files import files_of
from stages.models.fingerprint import describe_model, telling

COLUMNS = (
    Column("caption", "string", doc="what the model says of the picture"),
    Column("caption_tokens", "int64", doc="tokens of the caption, without the closing one"),
    Column("caption_truncated", "bool", doc="max_tokens were not enough: the caption ends in the middle"),
)


class CaptionPictures:
    """Rows with an ``image`` to rows with its ``caption``. What is drawn comes from the seed and the row's id.

    A batch that does not fit into the device's memory is halved.
    """

    Settings = CaptionSettings

    def __init__(self, settings: CaptionSettings) -> None:
        device = chosen_device(settings.device)
        exact_float32(True)
        self.captioner, self.dtype, self.rooms = Captioner(settings, device), settings.dtype, Rooms(device)

    @staticmethod
    def describe(settings: CaptionSettings) -> StageInfo:
        metadata = {"caption.prompt": Prompter(settings).text(), "caption.generation": _generation(settings)}
        try:
            described = describe_model(settings.model, settings.revision, allow_pickle=bool(settings.allow_pickle))
        except FileNotFoundError as error:
            raise ModelError(str(error)) from None
        return StageInfo(COLUMNS, {"captioner": described}, metadata, {"image": "picture"})

    @property
    def holds(self) -> int:
        """Most rows at a time: a batch, and another that comes in behind it."""
        return 2 * self.captioner.batch

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return in_batches(rows, self.captioner.batch, self._captioned)

    def _captioned(self, rows: list[Row]) -> Iterator[Row]:
        good = [row for row in rows if row.get("image") is not None]
        missing = "there is no picture in the column 'image'; map one to it with input.columns"
        yield from (failed(row, missing) for row in rows if row.get("image") is None)
        if good:
            yield from self._said(good)

    def _said(self, rows: list[Row]) -> Iterator[Row]:
        pictures, keys = [row["image"] for row in rows], [str(row["id"]) for row in rows]
        room = self.rooms["captions"]
        try:
            parts = list(room.parts(len(rows), lambda part: self.captioner.captions(pictures[part], keys[part])))
        except PictureRefused as error:
            if len(rows) == 1:
                yield failed(rows[0], f"the model's processor does not take the picture: {error}")
            else:  # one of them stops the batch
                for row in rows:
                    yield from self._said([row])
            return
        for row, caption in zip(rows, (caption for part in parts for caption in part), strict=True):
            yield self._output(row, caption)

    def _output(self, row: Row, caption: Caption) -> Row:
        if not caption.finite:
            return failed(row, f"the model's scores are not finite in {self.dtype}; try dtype: bfloat16 or float32")
        if not caption.text:
            return failed(row, "the model says nothing of this picture; another `question` may help")
        return ok(row, caption=caption.text, caption_tokens=caption.tokens, caption_truncated=caption.truncated)


def _generation(settings: Captioning) -> str:
    """What the model's folder says of generating, as JSON: penalties, forbidden tokens, ... decide captions too."""
    files = files_of(settings.model, settings.revision)
    name = "generation_config.json"
    return json.dumps(telling(json.loads(files.text(name))) if name in files.names else {}, sort_keys=True)
