"""ReNoise: fixed-point iterates, of which the result is a weighted mean.

Legend as in `stages.inversion.engine`.
"""

from __future__ import annotations

import torch

from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule


class ReNoise(Rule[tuple[torch.Tensor]]):
    """ReNoise (Garibi et al., 2024): z <- g(z), and the weighted mean of the iterates.

    With one renoising step the published weights are (.5, .5) at times below 250 and (0, 1) above. For more steps the
    last two iterates take these weights (ours).

    Args:
        renoises: Evaluations a step beyond the first.
        average_below: Times below it take the mean of the last two iterates.
    """

    def __init__(self, renoises: int = 1, average_below: float = 250) -> None:
        if renoises < 1:
            raise ValueError(f"renoises is {renoises}: renoise needs at least 1")
        self.limit, self.average_below = renoises + 1, average_below

    def blank(self, z_BCHW: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.zeros_like(z_BCHW),)

    def update(self, point: Evaluation, state: tuple[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        (before_BCHW,) = state
        average_B = per_row(point.done_B & (point.step.t_B < self.average_below), before_BCHW)
        return torch.where(average_B, (point.g_BCHW + before_BCHW) / 2, point.g_BCHW), (point.g_BCHW,)
