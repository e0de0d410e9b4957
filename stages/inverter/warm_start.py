"""A start for new words: near the text latents that a concept's pictures invert to. Ours.

Legend: I training pictures, T text positions, K width of the text condition, V new words, E their width over all
encoders; C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stages.engine.gradients import RowGradient, loss_scale
from stages.inverter.model import TextInverter
from stages.models.words import Encoder, encode

STEPS = 200
"""Steps of the text encoder alone; each costs a small part of a learning step, which runs the U-Net too."""


def warm_start(
    encoders: Sequence[Encoder],
    inverter: TextInverter,
    z_ICHW: torch.Tensor,
    ids_EIT: Sequence[torch.Tensor],
    which_EIT: Sequence[torch.Tensor],
    start_VE: torch.Tensor,
    *,
    lr: float,
    steps: int = STEPS,
) -> torch.Tensor:
    """Move new words until their prompts' text latents are near those that the pictures invert to; no U-Net is run.

    Args:
        encoders: The frozen text encoders.
        inverter: Trained on the same model.
        z_ICHW: Latents of a concept's training pictures.
        ids_EIT, which_EIT: Their prompts, as `stages.models.words.encode` takes them.
        start_VE: Where the words start.
        lr, steps: Of AdamW, without weight decay.

    Returns:
        The words' vectors, (V, E).
    """
    with torch.no_grad():
        wanted_ITK, _ = inverter(z_ICHW)
    v_1VE = start_VE[None].clone().requires_grad_(True)
    gradient = RowGradient(1, loss_scale(encoder.table.dtype for encoder in encoders), v_1VE.device)
    optimiser = torch.optim.AdamW([v_1VE], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        text_ITK, _ = encode(encoders, ids_EIT, which_EIT, v_1VE.expand(len(z_ICHW), -1, -1))
        loss_1 = ((text_ITK.float() - wanted_ITK) / inverter.std_TK).square().mean()[None]
        v_1VE.grad, skip_1 = gradient(loss_1, v_1VE)
        if not bool(skip_1):
            optimiser.step()
    return v_1VE[0].detach()
