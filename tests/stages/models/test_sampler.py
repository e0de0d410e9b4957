"""One sampling loop: against a plain one, with what a replay adds, step by step, and computed again on the way back."""

from __future__ import annotations

import torch

from stages.models.latent import Condition
from stages.models.sampler import denoise, sample
from stages.models.schedule import ddim_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS = 4


def predict(z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
    return torch.tanh(z_BCHW + condition["text_BLE"].mean((1, 2)).view(-1, 1, 1, 1)) * (1 + t_B.view(-1, 1, 1, 1) / 1e3)


def noise() -> torch.Tensor:
    return torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0))


def test_it_is_the_loop_over_the_steps() -> None:
    schedule = ddim_schedule(SD, STEPS)
    texts = torch.randn((STEPS, 2, 3, 5), generator=torch.Generator().manual_seed(1))
    bias = torch.randn((2, STEPS, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    z_BCHW, path = noise(), []
    for k in reversed(range(STEPS)):
        m_BCHW = predict(z_BCHW, schedule.t_S[k].expand(2), {"text_BLE": texts[k]})
        scale, weight = float(schedule.scale_S[k]), float(schedule.weight_S[k])
        z_BCHW = scale * z_BCHW + weight * m_BCHW + bias[:, k]
        path.append(z_BCHW)
    found = list(denoise(predict, schedule, noise(), lambda k: {"text_BLE": texts[k]}, bias))
    torch.testing.assert_close(torch.stack(found), torch.stack(path))
    last = sample(predict, schedule, noise(), lambda k: {"text_BLE": texts[k]}, bias)
    assert torch.equal(last, found[-1])
    assert torch.equal(
        sample(predict, schedule, noise(), {"text_BLE": texts[0]}),
        [*denoise(predict, schedule, noise(), {"text_BLE": texts[0]})][-1],
    )


def test_gradients_reach_the_noise_and_recomputing_does_not_change_them() -> None:
    schedule, condition = ddim_schedule(SD, STEPS), {"text_BLE": torch.ones(2, 3, 5)}
    gradients, calls = [], []

    def counted(z_BCHW: torch.Tensor, t_B: torch.Tensor, told: Condition) -> torch.Tensor:
        calls.append(int(t_B[0]))
        return predict(z_BCHW, t_B, told)

    for recompute in (False, True):
        z_BCHW = noise().requires_grad_(True)
        *_, last = denoise(counted, schedule, z_BCHW, condition, recompute=recompute)
        gradients.append(torch.autograd.grad(last.square().sum(), z_BCHW)[0])
    assert torch.equal(*gradients)
    assert len(calls) == 3 * STEPS
