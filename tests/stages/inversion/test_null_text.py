"""Null-text inversion against the published loop."""

from __future__ import annotations

import torch

from stages.inversion.explicit import Ddim
from stages.inversion.null_text import generate_null_text, learn_null_text
from tests.stages.inversion.plain import STEPS, run


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
