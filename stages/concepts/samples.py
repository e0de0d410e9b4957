"""Pictures from prompts with learned words, and the sheets that show them.

Legend: V new words, E width of a word over all encoders, B prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from stages.models.latent import Condition, LatentModel
from stages.models.pictures import to_picture
from stages.models.words import encode, tokenize

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16


@torch.no_grad()
def generate(
    model: LatentModel,
    prompts: Sequence[str],
    words: Sequence[str],
    vectors_VE: torch.Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
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
        batch: Pictures in one pass.
    """
    made: list[Image] = []
    for start in range(0, len(prompts), batch):
        condition = _conditions(model, prompts[start : start + batch], words, vectors_VE, guided=guidance > 1)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]]
        z_BCHW = model.draw(condition, steps=steps, guidance=guidance, generators=generators)
        made += [to_picture(x_CHW) for x_CHW in model.decode(z_BCHW).cpu()]
    return made


def _conditions(
    model: LatentModel, prompts: Sequence[str], words: Sequence[str], vectors_VE: torch.Tensor, *, guided: bool
) -> Condition:
    """The condition of prompts with new words; under guidance with that of the model's empty prompt."""
    encoders = model.text_encoders
    tokens = [[tokenize(encoder, prompt, words) for prompt in prompts] for encoder in encoders]
    ids, which = ([torch.stack([pair[i] for pair in one]).to(model.device) for one in tokens] for i in (0, 1))
    new_BVE = vectors_VE.to(model.device).expand(len(prompts), -1, -1)
    condition = model.text_condition(*encode(encoders, ids, which, new_BVE))
    if guided:
        empty = model.condition([""] * len(prompts), guided=True)
        condition |= {name: value for name, value in empty.items() if name.startswith("null_")}
    return condition


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
