"""The report of invert-images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.kinds.invert_images import InvertImages, _draw_methods


class Stored:
    """As much of a view as the table of methods asks for."""

    columns = {"method": "text", "psnr": "number"}

    def __init__(self, methods: Sequence[Any]) -> None:
        job = InvertImages.model_validate({"input": "x", "model": "micro:stable-diffusion", "methods": methods})
        self.config = job.own_settings()
        self.labels = [method.label for method in job.methods]

    def rows(self, columns: Sequence[str], limit: int) -> list[dict[str, Any]]:
        return [{"method": label, "psnr": 20.0 + number} for number, label in enumerate(self.labels)]


def test_methods_that_store_more_than_a_seed_stand_apart() -> None:
    """By what each method's settings say of it, whatever it is called."""
    methods = ["ddim", "edict", {"method": "lbo", "name": "plain"}, {"method": "lbo", "name": "bias", "replay": True},
               "null-text", {"method": "belm", "name": "b"}]  # fmt: skip
    page = str(_draw_methods(Stored(methods)))  # type: ignore[arg-type]
    first, _, second = page.partition("With extra state beside the seed:")
    for label in ("ddim", "plain"):
        assert label in first
        assert label not in second
    for label in ("edict", "bias", "null-text", ">b<"):
        assert label in second
        assert label not in first
