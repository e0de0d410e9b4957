"""The noise-prediction loss of a frozen latent diffusion model, a row at a time.

Legend: B rows, C H W latents, T training times, L text positions, E width of the text condition.
"""

from __future__ import annotations

import torch

from stages.models.latent import LatentModel
from stages.models.schedule import noise_levels


class DenoisingLoss:
    """|m(z_t, t, c) - target|^2 with the model's own noise levels and prediction type.

    Ho et al., 2020 (equation 14) for epsilon models; Salimans and Ho, 2022 (appendix D) for v models.

    Args:
        model: Frozen; gradients flow through it to the condition.

    Raises:
        ValueError: A prediction type without this loss.
    """

    def __init__(self, model: LatentModel) -> None:
        config = model.geometry.scheduler
        self.prediction: str = config.get("prediction_type", "epsilon")
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"the model predicts {self.prediction!r}; epsilon and v_prediction are supported")
        self.model, self.predict = model, model.predictor()
        self.abar_T = noise_levels(config).to(model.device)

    @property
    def timesteps(self) -> int:
        return len(self.abar_T)

    def __call__(
        self,
        z_BCHW: torch.Tensor,
        noise_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        text_BLE: torch.Tensor,
        pooled_BE: torch.Tensor | None,
    ) -> torch.Tensor:
        """loss_B, the mean over a row's latent numbers, float32. `pooled_BE`: see `LatentModel.text_condition`."""
        abar_B = self.abar_T[t_B].view(-1, 1, 1, 1)
        alpha, sigma = abar_B.sqrt().to(z_BCHW.dtype), (1 - abar_B).sqrt().to(z_BCHW.dtype)
        noisy = alpha * z_BCHW + sigma * noise_BCHW
        target = noise_BCHW if self.prediction == "epsilon" else alpha * noise_BCHW - sigma * z_BCHW
        output = self.predict(noisy, t_B, self.model.text_condition(text_BLE, pooled_BE))
        return (output - target).square().mean((1, 2, 3))
