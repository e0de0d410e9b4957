"""Null-text inversion against the published loop."""

from __future__ import annotations

import pytest
import torch

from stages.engine.adamw import RowAdamW
from stages.engine.gradients import loss_scale
from stages.inversion.explicit import Ddim
from stages.inversion.null_text import generate_null_text, learn_null_text
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.stages.inversion.plain import STEPS, run
from tests.support import tiny_stable_diffusion


def test_null_text_is_the_published_loop(model, work) -> None:
    z, condition, schedule = work
    rows = run(model, work, Ddim(), keep_path=True)
    path = torch.stack([row["path"] for row in rows])
    torch.testing.assert_close(path[:, 0], z)
    learned = learn_null_text(model.predictor(), schedule, path, condition, guidance=7.5, iterations=3)
    again = generate_null_text(model.predictor(), schedule, path[:, -1], condition, learned.null_BSLE, guidance=7.5)
    torch.testing.assert_close(again, learned.z_BCHW, rtol=1e-4, atol=1e-4)
    for row in range(2):
        text, null = condition["text_BLE"][row : row + 1], condition["null_text_BLE"][row : row + 1].clone()
        z_row = path[row : row + 1, -1]
        for i, k in enumerate(range(STEPS - 1, -1, -1)):
            step, t = schedule.at(torch.tensor([k])), schedule.t_S[k : k + 1]
            null = null.detach().clone().requires_grad_(True)
            adam = torch.optim.Adam([null], lr=1e-2 * (1 - i / 100))
            with torch.no_grad():
                conditioned = model.unet(z_row, t, text).sample
            for _ in range(3):
                base = model.unet(z_row, t, null).sample
                loss = torch.nn.functional.mse_loss(
                    step.down(z_row, base + 7.5 * (conditioned - base)), path[row : row + 1, k]
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
                if loss.item() < 1e-5 + 2e-5 * i:
                    break
            with torch.no_grad():
                base = model.unet(z_row, t, null).sample
                z_row = step.down(z_row, base + 7.5 * (conditioned - base))
        torch.testing.assert_close(learned.z_BCHW[row], z_row[0], rtol=2e-2, atol=5e-3)


def test_float16_keeps_the_gradient_near_the_pivot(model, work, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance hardly above 1 makes a tiny latent's gradient as small as a real one's, which is a mean over 64 times as
    many numbers and small after some updates; the pivot is moved, so that float16's own error is not the distance."""
    half = open_latent_model(
        LatentModelSettings(model=tiny_stable_diffusion.build(tmp_path), device="cpu", dtype="float16")
    )
    _, condition, schedule = work
    path = torch.stack([row["path"] for row in run(model, work, Ddim(), keep_path=True)])
    path[:, :-1] += 0.03 * torch.randn(path[:, :-1].shape, generator=torch.Generator().manual_seed(2))
    step = RowAdamW.step

    def gradients(model, scale: float | None) -> torch.Tensor:
        """Of the first update: (B, L E)."""
        seen: list[torch.Tensor] = []

        def kept(self, grad, active_B=None, lr_B=None) -> None:
            seen.append(grad.detach().clone())
            step(self, grad, active_B, lr_B)

        monkeypatch.setattr(RowAdamW, "step", kept)
        learn_null_text(model.predictor(), schedule, path, condition, guidance=1.001, iterations=1, scale=scale)
        return seen[0].flatten(1).double()

    reference = gradients(model, None)

    def cosine_B(scale: float | None) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(gradients(half, scale), reference, dim=1)

    assert float(cosine_B(loss_scale(half.dtypes.values())).min()) > 0.999
    assert float(cosine_B(None).max()) < 0.9
