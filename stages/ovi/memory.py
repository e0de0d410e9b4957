"""What inverting prompts takes of a GPU, told of configurations alone."""

from __future__ import annotations

from typing import Any

import torch

from stages.models import clip, kandinsky
from stages.models.copies import here
from stages.models.memory import on_meta
from stages.models.vision_tower import VisionTower
from stages.ovi.settings import OVI, InvertPromptsSettings, TrainedPrior

WHOLE, HALF = 4, 2
"""Bytes of a weight: of the encoders, and of networks whose type no setting names."""


def weight_bytes(settings: InvertPromptsSettings) -> int:
    """Of all networks that a worker holds on a GPU, each counted once."""
    model, revision = settings.encoder, settings.revision
    whole, half = [clip.blank(model, "text", revision)], list[Any]()
    precisions = {method.precision for method in settings.methods if isinstance(method, OVI)}
    products = 0
    if settings.decoder is not None or precisions:
        whole.append(clip.blank(model, "image", revision))
        linear = [layer for layer in whole[-1].modules() if isinstance(layer, torch.nn.Linear)]
        products = HALF * _numbers(linear) * len(precisions - {"float32"})  # see `halved_products`
        if settings.encoder_of_one_precision:
            products -= WHOLE * _numbers(linear) * (precisions != {"float32"})
    for method in settings.methods:
        if isinstance(method, TrainedPrior):
            half += _prior(method, settings)
    if settings.decoder is not None:
        half += kandinsky.blanks(settings.decoder)
    return WHOLE * _numbers(whole) + HALF * _numbers(half) + products


def _prior(method: TrainedPrior, settings: InvertPromptsSettings) -> list[Any]:
    """A trained prior, and its text encoder where that is not the stage's own."""
    from diffusers import PriorTransformer

    own = method.model or settings.encoder
    folder, part = (method.prior, None) if method.prior else (own, "prior")
    revision = settings.revision if folder == settings.encoder else None
    config = PriorTransformer.load_config(here(folder), subfolder=part, revision=revision)
    encoders = [] if own == settings.encoder else [clip.blank(own, "text")]
    return [on_meta(PriorTransformer, config, torch.float16), *encoders]


def row_bytes(settings: InvertPromptsSettings) -> dict[str, int]:
    """What a prompt adds in a step, by the label of each method that goes through the image encoder."""
    found = {}
    for method in settings.methods:
        if isinstance(method, OVI):
            network = clip.blank(settings.encoder, "image", settings.revision)
            found[method.label] = VisionTower(network, method.tokens, method.compact).row_bytes()
    return found


def _numbers(networks: list[Any]) -> int:
    return sum(weight.numel() for network in networks for weight in network.parameters())
