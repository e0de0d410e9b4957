"""Pictures from prompts with learned words, and the sheets that show them.

Legend: V new words, E width of a word over all encoders, B prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from stages.models.unet import LatentDiffusion
from stages.models.words import encode, encoders_of, tokenize

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    words: Sequence[str],
    vectors_VE: torch.Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: int,
    batch: int = BATCH,
) -> list[Image]:
    """A picture a prompt by the model's own pipeline, as if the new words stood in its vocabulary.

    Args:
        model: Frozen.
        prompts: May hold any of the new words.
        words: The new words, in angle brackets.
        vectors_VE: Their vectors.
        seeds: One a prompt: a picture does not depend on the others beside it.
        steps, guidance: Of the sampler.
        size: Side in pixels.
        batch: Pictures in one pass.
    """
    made: list[Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]]
        latents = model.pipeline(
            **_conditions(model, part, words, vectors_VE, size, guided=guidance > 1),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
            generator=generators,
            output_type="latent",
        ).images
        pixels = model.decode(latents)
        made += model.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return made


def _conditions(
    model: LatentDiffusion,
    prompts: Sequence[str],
    words: Sequence[str],
    vectors_VE: torch.Tensor,
    size: int,
    guided: bool,
) -> dict[str, torch.Tensor]:
    encoders = encoders_of(model.pipeline)
    tokens = [[tokenize(encoder, prompt, words) for prompt in prompts] for encoder in encoders]
    ids, which = ([torch.stack([pair[i] for pair in one]).to(model.device) for one in tokens] for i in (0, 1))
    new_BVE = vectors_VE.to(model.device).expand(len(prompts), -1, -1)
    text_BTK, pooled_BP = encode(encoders, ids, which, new_BVE)
    made = {"prompt_embeds": text_BTK}
    if guided:
        empty = model.condition([""] * len(prompts), size=size, guided=True)
        made["negative_prompt_embeds"] = empty["null_text_BLE"]
        if model.kind == "sdxl":
            made["negative_pooled_prompt_embeds"] = empty["null_pooled_BE"]
    if model.kind == "sdxl" and pooled_BP is not None:
        made["pooled_prompt_embeds"] = pooled_BP
    return made


def without_concept(prompt: str) -> str:
    """The prompt with its new words taken out: ``a heart that is <x-1> in <x-2>`` -> ``a heart``.

    Everything from the first new word to the last goes, and a ``that is`` before it.
    """
    word = r"<[a-z0-9-]+>"
    text = re.sub(rf"(\s+(that|which)\s+(is|are))?\s*{word}(.*{word})?", " ", prompt)
    return re.sub(r"\s+([,.!?])", r"\1", " ".join(text.split()))


def sheet(pictures: Sequence[Image], columns: int | None = None, gap: int = 4) -> Image:
    """Pictures of one size in a grid, row by row, on white."""
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        page.paste(picture, (number % columns * (width + gap), number // columns * (height + gap)))
    return page


def concept_tokens(prompt: str, name: str, tokens: Sequence[str]) -> str:
    """The prompt with ``<cpt-1>`` and ``<subj-1>`` (or ``<subj>``) written out as this concept's own words.

    Raises:
        ValueError: The prompt names a word that the concept does not have, or none at all.
    """

    def own(match: re.Match[str]) -> str:
        kind, number = match.group(1), match.group(2) or "1"
        return f"<{name}-{number}>" if kind == "cpt" else f"<{name}-subject-{number}>"

    text = re.sub(r"<(cpt|subj)(?:-([0-9]+))?>", own, prompt)
    used = re.findall(r"<[^<>]*>", text)
    unknown = [word for word in used if word not in tokens]
    if unknown or not used:
        shown = f"names {unknown[0]}" if unknown else "names no learned word"
        raise ValueError(f"the prompt {shown}; this concept has {', '.join(tokens)} (short: <cpt-1>, <cpt-2>, <subj>)")
    return text


def load_learned(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of one concept among a dataset's rows.

    Raises:
        ValueError: There is none, with the names there are.
    """
    found = [row for row in rows if row["name"] == name or row["id"] == name]
    if not found:
        names = sorted({str(row["name"]) for row in rows if row["name"]})
        raise ValueError(f"no concept {name!r} was learned there; it holds {', '.join(names[:20])}")
    return found[0]
