"""How close two pictures are, and how Gaussian a latent is.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents.
"""

from __future__ import annotations

import torch


def measure_pictures(made_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> dict[str, list[float]]:
    """PSNR (dB) and SSIM of each row in [0, 1], by torchmetrics; `made` is clipped first. Identical rows have infinite
    PSNR.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    made, wanted = ((x.float() / 2 + 0.5).clamp(0, 1) for x in (made_BCHW, x_BCHW))
    psnr_B = peak_signal_noise_ratio(made, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim_B = structural_similarity_index_measure(made, wanted, data_range=1.0, reduction="none")
    return {"psnr": psnr_B.flatten().tolist(), "ssim": ssim_B.flatten().tolist()}  # type: ignore[union-attr]


def noise_statistics(z_BCHW: torch.Tensor) -> dict[str, list[float]]:
    """How Gaussian each row's noise is: mean, standard deviation, excess kurtosis, and the mean correlation of
    neighbours.

    White noise has 0, 1, 0, 0 (ours: the correlation is of values one step apart, over rows and columns of each
    channel).
    """
    flat_BN = z_BCHW.double().flatten(1)
    mean_B, std_B = flat_BN.mean(1), flat_BN.std(1, unbiased=False)
    centred = (z_BCHW.double() - mean_B.view(-1, 1, 1, 1)) / std_B.clamp(min=1e-12).view(-1, 1, 1, 1)
    kurtosis_B = centred.pow(4).flatten(1).mean(1) - 3
    across_B = (centred[..., 1:] * centred[..., :-1]).flatten(1).mean(1)
    down_B = (centred[..., 1:, :] * centred[..., :-1, :]).flatten(1).mean(1)
    return {
        "seed_mean": mean_B.tolist(),
        "seed_std": std_B.tolist(),
        "seed_kurtosis": kurtosis_B.tolist(),
        "seed_autocorrelation": ((across_B + down_B) / 2).tolist(),
    }
