"""The noise-prediction loss of a frozen latent diffusion model, a row at a time, and the latents it is measured on.

Legend: B rows, C H W latents, T text positions, K width of the text condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from stages.models.unet import Condition, LatentDiffusion

if TYPE_CHECKING:
    from PIL.Image import Image


class DenoisingLoss:
    """|m(z_t, t, c) - target|^2 with the model's own schedule and prediction type.

    Ho et al., 2020 (equation 14) for epsilon models; Salimans and Ho, 2022 (appendix D) for v models.

    Args:
        model: Frozen; gradients flow through it to the condition.
        size: Side of the pictures in pixels (SDXL is told it).

    Raises:
        ValueError: A prediction type without this loss.
    """

    def __init__(self, model: LatentDiffusion, size: int) -> None:
        config = model.pipeline.scheduler.config
        self.prediction: str = config.get("prediction_type", "epsilon")
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"the model predicts {self.prediction!r}; epsilon and v_prediction are supported")
        self.model, self.size = model, size
        self.abar_T = model.pipeline.scheduler.alphas_cumprod.double().to(model.device)

    @property
    def timesteps(self) -> int:
        return len(self.abar_T)

    def __call__(
        self,
        z_BCHW: torch.Tensor,
        noise_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        text_BTK: torch.Tensor,
        pooled_BP: torch.Tensor | None,
    ) -> torch.Tensor:
        """loss_B, the mean over a row's latent numbers, float32. `pooled_BP` is SDXL's second condition."""
        abar_B = self.abar_T[t_B].view(-1, 1, 1, 1)
        alpha, sigma = abar_B.sqrt().to(z_BCHW.dtype), (1 - abar_B).sqrt().to(z_BCHW.dtype)
        noisy = alpha * z_BCHW + sigma * noise_BCHW
        target = noise_BCHW if self.prediction == "epsilon" else alpha * noise_BCHW - sigma * z_BCHW
        condition: Condition = {"text_BLE": text_BTK}
        if self.model.kind == "sdxl":
            if pooled_BP is None:
                raise ValueError("this U-Net needs a pooled text embedding, and the text encoder has none")
            sizes = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], device=z_BCHW.device)
            condition |= {"pooled_BE": pooled_BP, "time_ids_B6": sizes.to(self.model.dtype).expand(len(z_BCHW), -1)}
        output = self.model.forward(noisy, t_B, condition)
        return (output - target).square().mean((1, 2, 3))


@torch.no_grad()
def encode_pictures(model: LatentDiffusion, pictures: Sequence[Image], size: int) -> torch.Tensor:
    """Latents (B, C, H, W) of RGB pictures: each scaled until its shorter side fits, then cut to its middle square."""
    from PIL import Image, ImageOps

    fitted = [ImageOps.fit(picture, (size, size), method=Image.Resampling.BICUBIC) for picture in pictures]
    array = np.stack([np.asarray(picture, dtype=np.float32) for picture in fitted]) / 127.5 - 1
    return model.encode(torch.from_numpy(array).permute(0, 3, 1, 2))
