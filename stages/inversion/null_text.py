"""Null-text inversion (Mokady et al., 2023): the negative condition is learned, a vector for every timestep and row.

Extra state: S x L x E numbers a row are stored beside the noise. Rows share a timestep; each stops its inner iterations
by itself.

Legend: B rows; S steps; L text tokens, E their width; `path_BSCHW` the S + 1 latents of the pivot, z_0 first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.engine.adamw import RowAdamW
from stages.engine.gradients import RowGradient
from stages.models.latent import Condition, Predict
from stages.models.sampler import sample
from stages.models.schedule import Schedule


@dataclass(frozen=True)
class NullText:
    """What a batch's optimisation gave: `null_BSLE`, the regenerated z_0, and network evaluations and gradients a
    row.
    """

    null_BSLE: torch.Tensor
    z_BCHW: torch.Tensor
    forwards_B: torch.Tensor
    backwards_B: torch.Tensor


def learn_null_text(
    predict: Predict,
    schedule: Schedule,
    path_BSCHW: torch.Tensor,
    condition: Condition,
    *,
    guidance: float = 7.5,
    iterations: int = 10,
    scale: float | None = None,
) -> NullText:
    """Bend guided sampling back onto the pivot, step by step from the noise.

    At sampling step i (0 at the noise) Adam at rate 1e-2 (1 - i/100) minimises the mean squared distance of the guided
    step to the pivot's next latent over the negative embedding; a row stops below 1e-5 + 2e-5 i. The embedding carries
    over to the next step as its start. The rate never falls below 1e-4 (the published formula reaches zero at 100
    steps; ours).

    Args:
        predict: The network without guidance.
        path_BSCHW: The DDIM inversion at guidance 1, z_0 first.
        condition: Needs `null_text_BLE`.
        scale: `RowGradient`'s: a mean over a latent's thousands of numbers, near the pivot, has a gradient that
            float16 rounds to zero. A row whose gradient overflows skips that update.
    """
    rows, steps = len(path_BSCHW), len(schedule)
    null_BLE = condition["null_text_BLE"].detach().float().clone()
    text = {name: value for name, value in condition.items() if not name.startswith("null_")}
    learned: list[torch.Tensor] = []
    z_BCHW = path_BSCHW[:, steps]
    forwards_B = torch.zeros(rows, dtype=torch.int64, device=z_BCHW.device)
    backwards_B = torch.zeros_like(forwards_B)
    gradient = RowGradient(rows, scale, z_BCHW.device)
    for i, k in enumerate(range(steps - 1, -1, -1)):
        step = schedule.at(torch.full((rows,), k, device=z_BCHW.device))
        target_BCHW = path_BSCHW[:, k]
        optimiser = RowAdamW(null_BLE, max(1e-2 * (1 - i / 100), 1e-4), weight_decay=0.0)
        active_B = torch.ones(rows, dtype=torch.bool, device=z_BCHW.device)
        with torch.no_grad():
            text_BCHW = predict(z_BCHW, step.t_B, text)
        forwards_B += 1

        def guided(null: torch.Tensor) -> torch.Tensor:
            # called before the loop moves on
            base_BCHW = predict(z_BCHW, step.t_B, negative(condition, null))  # noqa: B023
            return step.down(z_BCHW, base_BCHW + guidance * (text_BCHW - base_BCHW))  # noqa: B023

        for _ in range(iterations):
            with torch.enable_grad():
                variable_BLE = null_BLE.detach().clone().requires_grad_(True)
                loss_B = (guided(variable_BLE) - target_BCHW).square().flatten(1).mean(1)
                gradient_BLE, skip_B = gradient(loss_B, variable_BLE, active_B)
            forwards_B += active_B
            backwards_B += active_B
            optimiser.step(gradient_BLE, active_B & ~skip_B)
            # The loss belongs to the embedding before this update, as in the published loop: the update is kept.
            active_B = active_B & (loss_B.detach() >= 1e-5 + 2e-5 * i)
            if not bool(active_B.any()):
                break
        with torch.no_grad():
            z_BCHW = guided(null_BLE)
        forwards_B += 1
        learned.append(null_BLE.clone())
    null_BSLE = torch.stack(learned[::-1], 1)
    return NullText(null_BSLE, z_BCHW, forwards_B, backwards_B)


@torch.no_grad()
def generate_null_text(
    predict: Predict,
    schedule: Schedule,
    z_BCHW: torch.Tensor,
    condition: Condition,
    null_BSLE: torch.Tensor,
    *,
    guidance: float = 7.5,
) -> torch.Tensor:
    """Guided sampling with each step's own negative embedding (index 0 next to the picture)."""
    text = {name: value for name, value in condition.items() if not name.startswith("null_")}

    def guided(z_BCHW: torch.Tensor, t_B: torch.Tensor, null: Condition) -> torch.Tensor:
        base_BCHW = predict(z_BCHW, t_B, null)
        return base_BCHW + guidance * (predict(z_BCHW, t_B, text) - base_BCHW)

    return sample(guided, schedule, z_BCHW, lambda k: negative(condition, null_BSLE[:, k]))


def negative(condition: Condition, null_BLE: torch.Tensor) -> Condition:
    """The negative condition with this embedding as its text."""
    null = {**condition, "null_text_BLE": null_BLE}
    return {name: null.get(f"null_{name}", value) for name, value in condition.items() if not name.startswith("null_")}
