"""The context loss: a new word is drawn towards words that go with the concept and away from their opposites.

Legend: B concepts, V new words of one, M context words (padded), E width of an embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Form = Literal["paper", "normalised"]


def context_loss(
    v_BVE: torch.Tensor,
    positive_BVME: torch.Tensor,
    negative_BVME: torch.Tensor,
    positive_BVM: torch.Tensor,
    negative_BVM: torch.Tensor,
    form: Form = "normalised",
    temperature: float = 0.07,
) -> torch.Tensor:
    """-sum over new words of log(sum exp(v.P) / (sum exp(v.P) + sum exp(v.N))), loss_B.

    Lego (Motamed, Paudel and Van Gool, ECCV 2024), section 3. ``paper`` takes raw dot products, as the paper prints
    them; ``normalised`` takes cosines over a temperature, as ReVersion's steering loss does (Huang et al., 2023).

    Args:
        v_BVE: New words' vectors.
        positive_BVME, negative_BVME: Vectors of the context words.
        positive_BVM, negative_BVM: Which of them there are (bool). A word that lacks either side costs nothing.
        form: See above.
        temperature: Of the normalised form.
    """
    if form == "normalised":
        v_BVE, positive_BVME, negative_BVME = (F.normalize(x, dim=-1) for x in (v_BVE, positive_BVME, negative_BVME))
        v_BVE = v_BVE / temperature
    near_BV = _log_sum(v_BVE, positive_BVME, positive_BVM)
    far_BV = _log_sum(v_BVE, negative_BVME, negative_BVM)
    used_BV = positive_BVM.any(-1) & negative_BVM.any(-1)
    # The log of the ratio, written so that neither sum overflows.
    cost_BV = F.softplus(torch.where(used_BV, far_BV - near_BV, torch.zeros_like(near_BV)))
    return torch.where(used_BV, cost_BV, torch.zeros_like(cost_BV)).sum(-1)


def _log_sum(v_BVE: torch.Tensor, words_BVME: torch.Tensor, present_BVM: torch.Tensor) -> torch.Tensor:
    """log sum exp(v.w) over the words there are; 0 where there is none (and no gradient)."""
    dots_BVM = (words_BVME * v_BVE[..., None, :]).sum(-1)
    # A finite floor, not -inf: the gradient of logsumexp over nothing but -inf is NaN.
    return dots_BVM.masked_fill(~present_BVM, -1e9).logsumexp(-1).masked_fill(~present_BVM.any(-1), 0.0)
