"""SeedSelect against plain loops and torch's own parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.models.clip import ImageEncoder
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.rare.seed_select import Target, centroid, clip_pixels, embedder, last_latents, optimise_noise, select_loss
from tests.support.rare import picture


@pytest.mark.parametrize("size", [32, 48])
def test_clip_pixels_are_the_processors(clip: str, size: int) -> None:
    encoder = ImageEncoder(clip)
    drawn = picture(3, (size, size))
    x = torch.from_numpy(np.asarray(drawn, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    wanted = encoder.processor([drawn], return_tensors="pt").pixel_values
    # Pillow rounds a resized picture to 8 bits; a grey level is 1/255 before the division by the deviation (0.26).
    assert float((clip_pixels(x, encoder) - wanted).abs().max()) < (1e-5 if size == 32 else 2.5 / 255 / 0.26)


def test_the_last_latents_are_the_samplers_and_checkpoints_do_not_change_gradients(model: LatentModel) -> None:
    schedule = model.schedule(5)
    predict = model.predictor(3.0)
    condition = model.condition(["red star", "a ring"], guided=True)
    z = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    tail = last_latents(predict, schedule, z, condition, 3)
    torch.testing.assert_close(tail[0], sample(predict, schedule, z.detach(), condition), atol=1e-5, rtol=1e-5)
    plain, kept = z, []
    for k in range(4, -1, -1):
        t = torch.full((2,), int(schedule.t_S[k]))
        plain = float(schedule.scale_S[k]) * plain + float(schedule.weight_S[k]) * predict(plain, t, condition)
        kept.insert(0, plain)
    for own, wanted in zip(tail, kept[:3], strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad(sum(one.square().sum() for one in tail), z)
    (theirs,) = torch.autograd.grad(sum(one.square().sum() for one in kept[:3]), z)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_loss_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn((2, 3, 2, 2), generator=generator) for _ in range(3)]
    given = torch.randn((5, 12), generator=generator)
    middle = centroid(given)
    mean = sum(np.array(row) / np.linalg.norm(row) for row in given.double().tolist())
    np.testing.assert_allclose(middle, mean / np.linalg.norm(mean), atol=1e-6)
    target = Target(middle.expand(2, -1), torch.randn((2, 3, 2, 2), generator=generator))
    found = select_loss(latents, target, lambda z: z.flatten(1))
    for row in range(2):
        total = float(np.mean((latents[0][row].numpy() - target.latent_BCHW[row].numpy()) ** 2))
        for weight, z in zip((0.7, 0.25, 0.05), latents, strict=True):  # the last step counts most
            flat = z[row].double().flatten().numpy()
            total += 10 * weight * (1 - flat @ middle.double().numpy() / np.linalg.norm(flat))
        assert float(found[row]) == pytest.approx(total, rel=1e-5)


def test_optimised_seeds_against_torch_adamw_row_by_row(model: LatentModel, clip: str) -> None:
    schedule = model.schedule(3)
    predict, embed = model.predictor(2.0), embedder(model.decode, ImageEncoder(clip))
    generator = torch.Generator().manual_seed(4)
    z, latent = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    target = Target(torch.nn.functional.normalize(torch.randn((2, 24), generator=generator), dim=1), latent)
    condition = model.condition(["red star", "a ring"], guided=True)
    found = optimise_noise(
        z, condition, target, predict=predict, schedule=schedule, embed=embed, iterations=5, rate=0.05
    )
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in condition.items()}
        aim = Target(target.centroid_BE[row : row + 1], latent[row : row + 1])
        variable = torch.nn.Parameter(z[row : row + 1].clone())
        adam = torch.optim.AdamW([variable], lr=0.05)
        losses = []
        for update in range(5):
            adam.param_groups[0]["lr"] = 0.05 if update < 3 else 0.005
            adam.zero_grad()
            loss = select_loss(last_latents(predict, schedule, variable, own, 3), aim, embed).sum()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
        assert float(found.start_B[row]) == pytest.approx(losses[0], rel=1e-4)
        assert float(found.loss_B[row]) == pytest.approx(losses[-1], rel=1e-3)
        assert losses[-1] < losses[0]
        assert float((found.z_BCHW[row] - variable[0].detach()).abs().max()) < 0.01
