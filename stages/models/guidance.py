"""Classifier-free guidance: two outputs of a network made into one.

Legend: B rows; `z_BCHW` latents; `m_BCHW` a network's output.
"""

from __future__ import annotations

import torch

from stages.models.latent import Combine, Condition, Predict


def guided(forward: Predict, combine: Combine) -> Predict:
    """The network under both prompts, in one call on 2B rows."""

    def predict(z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        both = {
            name: torch.cat([condition.get(f"null_{name}", value), value])
            for name, value in condition.items()
            if not name.startswith("null_")
        }
        return combine(*forward(torch.cat([z_BCHW, z_BCHW]), torch.cat([t_B, t_B]), both).chunk(2))

    return predict


def classifier_free(guidance: float) -> Combine:
    """Ho and Salimans, 2022, equation 6, with w + 1 = guidance."""

    def combine(null_BCHW: torch.Tensor, text_BCHW: torch.Tensor) -> torch.Tensor:
        return null_BCHW + guidance * (text_BCHW - null_BCHW)

    return combine
