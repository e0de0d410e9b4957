"""How a picture of a rare concept is drawn by more than its prompt: by anchors, texts of what the model draws well.

A guide changes no seed, so that each goes with every method of new noise. What it asks of the network it makes of the
concept's texts, in a predictor and a condition that `stages.models.sampler` takes.

Legend: B rows; P texts a row, the prompt first; `z_BCHW` latents; `m_BCHW` a network's output. At one latent and one
time outputs are linear in the score whatever they predict, so that sums of scores are made of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from pipeline.contract import Row
from stages.concepts.concept import ConceptError, picture_list
from stages.models.latent import Condition, Geometry, LatentModel, Predict
from stages.rare.settings import AapbGuide, ComposeGuide, Guide, R2fGuide


@dataclass(frozen=True)
class Texts:
    """What a picture is drawn by.

    Attributes:
        prompt: The concept's.
        anchor: What the model draws well and is near to it.
        parts: Of `compose`: a text of each attribute, and what it is set against; None: the negative prompt.
    """

    prompt: str
    anchor: str | None = None
    parts: tuple[tuple[str, str | None], ...] = ()

    @property
    def contrasts(self) -> tuple[bool, ...]:
        """Whether each part is set against a text of its own."""
        return tuple(versus is not None for _, versus in self.parts)


def read_texts(name: str, row: Row) -> Texts:
    """The texts of a concept's row: the columns ``prompt``, ``anchor``, and ``parts``: a list of texts, or of pairs.

    Raises:
        ConceptError: A part is neither a text nor a pair of them, or JSON cannot be read.
    """
    anchor = str(row.get("anchor") or "").strip() or None
    parts = tuple(_part(name, part) for part in picture_list(name, "parts", row.get("parts")))
    return Texts(str(row["prompt"]).strip(), anchor, parts)


def _part(name: str, part: Any) -> tuple[str, str | None]:
    texts = [part] if isinstance(part, str) else part
    if isinstance(texts, Sequence) and 1 <= len(texts) <= 2 and all(isinstance(t, str) and t.strip() for t in texts):
        return texts[0].strip(), texts[1].strip() if len(texts) == 2 else None
    raise ConceptError(
        f"concept {name}: the column 'parts' holds {part!r}; write a text, or a pair [with the attribute, without it]"
    )


Told = Condition | Callable[[int], Condition]
"""The same in every step, or made for step k, 0 next to the picture."""
Blend = Callable[[torch.Tensor | None, list[torch.Tensor]], torch.Tensor]
"""The output that stands for the prompt's, of that under the negative prompt (None: the network is not guided by two)
and those under each of the P texts."""


def drawn_by(
    guide: Guide,
    model: LatentModel,
    texts: Sequence[Texts],
    *,
    guidance: float,
    steps: int,
    negative: str | None = None,
) -> tuple[Predict, Told]:
    """What the sampler is given to draw a row of each of the texts.

    Args:
        guide: The rule.
        texts: With what the rule needs (see `lacks`), and alike in `Texts.contrasts`.
        guidance: Scale w.
        steps: Evaluations of the network.
        negative: The negative prompt.
    """
    if isinstance(guide, R2fGuide):
        own, anchor = _conditions(model, [_prompts(texts), _anchors(texts)], guidance, negative)
        shown = anchor_steps(steps, guide.until, guide.every)
        return model.predictor(guidance), lambda k: anchor if k in shown else own
    if isinstance(guide, AapbGuide):
        conditions = _conditions(model, [_prompts(texts), _anchors(texts)], guidance, negative)
        return _blended(model, guidance, _anchored(guide, guidance)), _joined(conditions)
    if isinstance(guide, ComposeGuide):
        rows = [[text for pair in one.parts for text in pair if text is not None] for one in texts]
        columns = [list(column) for column in zip(*rows, strict=True)]
        conditions = _conditions(model, [_prompts(texts), *columns], guidance, negative)
        return _blended(model, guidance, _composed(guide, texts[0].contrasts)), _joined(conditions)
    return model.predictor(guidance), _conditions(model, [_prompts(texts)], guidance, negative)[0]


def lacks(guide: Guide, texts: Texts) -> str | None:
    """Why a rule cannot draw a concept; None where it can."""
    if isinstance(guide, ComposeGuide) and not texts.parts:
        return f"{guide.label} needs the column 'parts': a list of texts, each of one attribute"
    if uses_anchor(guide):
        if texts.anchor is None:
            return f"{guide.label} needs the column 'anchor': a text near the prompt, of what the model draws well"
        if texts.anchor == texts.prompt:
            return f"{guide.label}: the anchor is the prompt itself ({texts.prompt!r}); name what the model draws well"
    return None


def uses_anchor(guide: Guide) -> bool:
    """Whether a rule draws by the row's anchor."""
    return isinstance(guide, R2fGuide | AapbGuide)


def check_guide(guide: Guide, geometry: Geometry, guidance: float) -> None:
    """Refuse what a model cannot be asked.

    Raises:
        ValueError: The rule needs the output under a negative prompt, and the model is not guided by one.
    """
    if geometry.guiding == "classifier-free" and guidance > 1:
        return
    why = (
        f"guides: {guide.label}: model {geometry.sizes.model!r} is not guided by a negative prompt"
        if geometry.guiding != "classifier-free"
        else f"guides: {guide.label}: guidance {guidance:g} leaves the negative prompt out"
    )
    if isinstance(guide, AapbGuide) and guide.g is None:
        raise ValueError(f"{why}, which the closed form of g needs: give it a `g` of its own, or take r2f")
    if isinstance(guide, ComposeGuide):
        raise ValueError(f"{why}, which parts are set against: take r2f, or aapb with a `g` of its own")


# --- rules


def anchor_steps(steps: int, until: float, every: int = 2) -> frozenset[int]:
    """The steps k that are shown the anchor: rare to frequent (R2F, Park et al., ICLR 2025).

    Down from the noise to the share `until` of the steps, prompts alternate, the anchor first and then in each
    `every`-th; below, where the rare attribute settles, the prompt stands alone.
    """
    return frozenset(steps - 1 - n for n in range(0, round(until * steps), every))


def blend_weight(
    null_BCHW: torch.Tensor, text_BCHW: torch.Tensor, anchor_BCHW: torch.Tensor, guidance: float
) -> torch.Tensor:
    """g_B = ((1-w)/w) <s_T - s_0, s_A - s_T> / |s_A - s_T|^2 (AAPB, arXiv 2603.19158), 0 where anchor and prompt agree.

    The guided score of the blend (1-g) s_T + g s_A is then as near as it can be to the prompt's own, s_T.
    """
    shift_BN = (anchor_BCHW - text_BCHW).flatten(1)
    along_B = ((text_BCHW - null_BCHW).flatten(1) * shift_BN).sum(1)
    length_B = shift_BN.square().sum(1)
    g_B = (1 - guidance) / guidance * along_B / length_B
    return torch.where(length_B > 0, g_B, 0)


def _anchored(guide: AapbGuide, guidance: float) -> Blend:
    def blend(null_BCHW: torch.Tensor | None, outputs: list[torch.Tensor]) -> torch.Tensor:
        text_BCHW, anchor_BCHW = outputs
        if guide.g is not None or null_BCHW is None:
            return torch.lerp(text_BCHW, anchor_BCHW, guide.g or 0)
        g_B = blend_weight(null_BCHW, text_BCHW, anchor_BCHW, guidance)
        return torch.lerp(text_BCHW, anchor_BCHW, g_B[:, None, None, None])

    return blend


def _composed(guide: ComposeGuide, contrasts: Sequence[bool]) -> Blend:
    """s_0 + whole (s_T - s_0) + weight sum_i (s_i - c_i); with whole 0 and c_i = s_0, composable diffusion (Liu et al.,
    ECCV 2022, equation 11)."""

    def blend(null_BCHW: torch.Tensor | None, outputs: list[torch.Tensor]) -> torch.Tensor:
        assert null_BCHW is not None
        made_BCHW = torch.lerp(null_BCHW, outputs[0], guide.whole)
        left = iter(outputs[1:])
        for contrasted in contrasts:
            part_BCHW = next(left)
            made_BCHW = made_BCHW + guide.weight * (part_BCHW - (next(left) if contrasted else null_BCHW))
        return made_BCHW

    return blend


# --- outputs under several texts


def _prompts(texts: Sequence[Texts]) -> list[str]:
    return [one.prompt for one in texts]


def _anchors(texts: Sequence[Texts]) -> list[str]:
    return [str(one.anchor) for one in texts]


def _conditions(
    model: LatentModel, columns: Sequence[list[str]], guidance: float, negative: str | None
) -> list[Condition]:
    """A condition for each column of B texts; encoded in one call, which pads them to one length."""
    rows = len(columns[0])
    every = model.condition(list(chain(*columns)), guided=guidance > 1, negative=negative)
    return [
        {name: value[start : start + rows] for name, value in every.items()}
        for start in range(0, rows * len(columns), rows)
    ]


def _joined(conditions: Sequence[Condition]) -> Condition:
    """One condition of P, whose n-th text's NAME is ``n_NAME`` from the second one on."""
    others = {
        f"{n}_{name}": value
        for n, condition in enumerate(conditions[1:], 1)
        for name, value in condition.items()
        if not name.startswith("null_")
    }
    return {**conditions[0], **others}


def _blended(model: LatentModel, guidance: float, blend: Blend) -> Predict:
    """The network under all texts in one call on as many times B rows, its outputs blended, and guided."""
    by_two = model.geometry.guiding == "classifier-free" and guidance > 1
    forward = model.predictor(1.0 if by_two else guidance)
    combine = model.combination(guidance) if by_two else None

    def predict(z_BCHW: torch.Tensor, t_B: torch.Tensor, told: Condition) -> torch.Tensor:
        names = [name for name in told if not name.startswith("null_") and not name[0].isdigit()]
        count = 1 + max(int(name.split("_")[0]) for name in told if name[0].isdigit())
        sources = ["null_"] * by_two + ["", *(f"{n}_" for n in range(1, count))]
        stacked = {name: torch.cat([told.get(f"{of}{name}", told[name]) for of in sources]) for name in names}
        m_BCHW = forward(z_BCHW.repeat(len(sources), 1, 1, 1), t_B.repeat(len(sources)), stacked)
        if combine is None:
            return blend(None, list(m_BCHW.chunk(count)))
        null, *outputs = m_BCHW.chunk(len(sources))
        return combine(null, blend(null, outputs))

    return predict
