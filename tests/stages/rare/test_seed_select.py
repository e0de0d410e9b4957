"""SeedSelect against plain loops and torch's own parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.engine.adamw import RowAdamW
from stages.engine.gradients import loss_scale
from stages.models.clip import ImageEncoder
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.models.settings import LatentModelSettings
from stages.rare.seed_select import Target, centroid, clip_pixels, embedder, last_latents, optimise_noise, select_loss
from tests.support import tiny_stable_diffusion
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


def test_float16_keeps_small_gradients_and_loses_no_update_to_an_overflow(
    model: LatentModel, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings that hardly move make the loss's gradient as small as that of a real latent, a mean over 64 times as
    many numbers, near its aim."""
    half = open_latent_model(
        LatentModelSettings(model=tiny_stable_diffusion.build(tmp_path), device="cpu", dtype="float16")
    )
    encoder = ImageEncoder(clip)
    z = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(4))
    condition = model.condition(["red star", "a ring"], guided=True)
    aim = torch.nn.functional.normalize(torch.randn((2, 25), generator=torch.Generator().manual_seed(5)), dim=1)
    step = RowAdamW.step

    def gradients(of: LatentModel, scale: float | None, size: float) -> torch.Tensor:
        """Of the update: (B, C H W)."""
        seen: list[torch.Tensor] = []

        def embed(z: torch.Tensor) -> torch.Tensor:
            return torch.cat([size * embedder(of.decode, encoder)(z), torch.ones(2, 1)], dim=1)

        def kept(self, grad, active_B=None, lr_B=None) -> None:
            seen.append(grad.detach().flatten(1).double())
            step(self, grad, active_B, lr_B)

        monkeypatch.setattr(RowAdamW, "step", kept)
        with torch.no_grad():
            latent = last_latents(of.predictor(2.0), of.schedule(3), z, condition, 1)[0]
        found = optimise_noise(
            z, condition, Target(aim, latent), predict=of.predictor(2.0), schedule=of.schedule(3), embed=embed,
            iterations=1, rate=0.05, scale=scale,
        )  # fmt: skip
        assert bool(found.z_BCHW.isfinite().all())
        (grad,) = seen
        return grad

    def cosine_B(scale: float | None, size: float) -> torch.Tensor:
        pair = gradients(half, scale, size), gradients(model, None, size)
        return torch.nn.functional.cosine_similarity(*pair, dim=1)

    scale = loss_scale(half.dtypes.values())
    assert float(cosine_B(scale, 1e-5).min()) > 0.999
    assert float(cosine_B(None, 1e-5).max()) < 0.999
    assert float(cosine_B(2.0**24, 1.0).min()) > 0.999


def test_a_row_whose_gradient_is_never_finite_becomes_nan(model: LatentModel) -> None:
    def embed(z: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.tensor([[True], [False]]), torch.nan, 1.0) * z.flatten(1)

    z = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(4))
    condition = model.condition(["red star", "a ring"])
    target = Target(torch.nn.functional.normalize(torch.ones((2, 256)), dim=1), torch.zeros_like(z))
    found = optimise_noise(
        z, condition, target, predict=model.predictor(), schedule=model.schedule(3), embed=embed, iterations=2,
        rate=0.05, scale=2.0**16,
    )  # fmt: skip
    assert bool(found.z_BCHW[0].isnan().all())
    assert bool(found.z_BCHW[1].isfinite().all())
