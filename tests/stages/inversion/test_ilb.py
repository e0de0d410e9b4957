"""Image Latent Boosting against torch's own Adam, and the joint form's bookkeeping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages.engine.adamw import RowAdamW
from stages.engine.gradients import loss_scale
from stages.inversion.ilb import BoostProblem, boost_decoder, boost_joint, cosine_rate
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.support import tiny_stable_diffusion

SHAPE = (2, 4, 4)
WEIGHT = torch.randn((3 * 64, 32), generator=torch.Generator().manual_seed(0)) / 6


def decode(z):
    return torch.tanh(z.flatten(1) @ WEIGHT.T).view(-1, 3, 8, 8)


def rows(count=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((count, 3, 8, 8), generator=generator) * 2 - 1
    z = torch.randn((count, *SHAPE), generator=generator) * 0.1
    return [{"id": str(i), "x": x[i], "z": z[i]} for i in range(count)]


def make(visit, steps=12):
    return BoostProblem(decode, slots=2, latent_shape=SHAPE, size=(8, 8), steps=steps, visit=visit, rate=0.1, warmup=3)


def alone(row, steps=12, offset=None):
    z = row["z"][None].clone().requires_grad_(True)
    adam = torch.optim.Adam([z], lr=1.0)
    rate = cosine_rate(0.1, steps, 3)
    for i in range(steps):
        for group in adam.param_groups:
            group["lr"] = float(rate(torch.tensor([i])))
        loss = (decode(z if offset is None else z + offset) - row["x"]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return z.detach()[0]


def test_decoder_form_is_adam_on_the_decoded_error() -> None:
    done = sorted(boost_decoder(make, rows()), key=lambda row: row["id"])
    for row, start in zip(done, rows(), strict=True):
        torch.testing.assert_close(row["z"], alone(start), rtol=1e-4, atol=1e-5)
        before = (decode(start["z"][None]) - start["x"]).square().mean()
        assert (decode(row["z"][None]) - row["x"]).square().mean() < before
        assert row["decodes"] == 36


def test_joint_form_with_a_perfect_round_trip_is_the_decoder_form() -> None:
    seen = []

    def round_trip(some):
        for row in some:
            seen.append(row["id"])
            yield {**row, "regenerated": row["z"]}

    done = sorted(boost_joint(make, round_trip, rows(), steps=12, every=4), key=lambda row: row["id"])
    assert sorted(seen) == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    for row, start in zip(done, rows(), strict=True):
        torch.testing.assert_close(row["z"], alone(start), rtol=1e-4, atol=1e-5)


def test_joint_form_fits_what_comes_back() -> None:
    offset = torch.full(SHAPE, 0.2)

    def lossy(some):
        for row in some:
            yield {**row, "regenerated": row["z"] + offset}

    done = sorted(boost_joint(make, lossy, rows(), steps=12, every=4), key=lambda row: row["id"])
    for row, start in zip(done, rows(), strict=True):
        torch.testing.assert_close(row["z"], alone(start, offset=offset), rtol=1e-4, atol=1e-5)


def test_float16_keeps_the_gradient_of_a_real_pictures_mean(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a 16 x 16 picture is made as small as a 512 x 512 one's mean over 1024 times as many numbers makes
    it: rows that differ from what is decoded by so much less."""
    config = Path(tiny_stable_diffusion.build(tmp_path)) / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    full, half = (
        open_latent_model(LatentModelSettings(model=str(tmp_path), device="cpu", dtype=dtype))
        for dtype in ("float32", "float16")
    )
    generator = torch.Generator().manual_seed(3)
    z, noise = torch.randn((2, 4, 8, 8), generator=generator), torch.randn((2, 3, 16, 16), generator=generator)
    offset = noise / 1024
    step = RowAdamW.step

    def gradients(model, scale: float | None) -> torch.Tensor:
        """Of the first update: (B, C H W)."""
        seen: list[torch.Tensor] = []

        def kept(self, grad, active_B=None, lr_B=None) -> None:
            seen.append(grad.detach().flatten(1).double())
            step(self, grad, active_B, lr_B)

        monkeypatch.setattr(RowAdamW, "step", kept)
        x = model.decode(z).detach() + offset
        problem = BoostProblem(model.decode, slots=2, latent_shape=(4, 8, 8), size=(16, 16), steps=1, scale=scale)
        problem.load([0, 1], [{"id": str(i), "x": x[i], "z": z[i]} for i in range(2)])
        problem.step()
        return seen[0]

    reference = gradients(full, None)

    def cosine_B(scale: float | None) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(gradients(half, scale), reference, dim=1)

    assert float(cosine_B(loss_scale([half.dtypes["vae"]])).min()) > 0.999
    assert float(cosine_B(None).max()) < 0.999


def test_a_row_that_overflows_skips_updates_and_counts_its_passes() -> None:
    """Also across visits: the halved scale comes along."""
    tried: list[int] = []

    def decode_half(z):
        tried.append(1)
        return decode(z).half().float()  # the gradient of what follows passes through float16

    def make_scaled(visit):
        return BoostProblem(
            decode_half,
            slots=1,
            latent_shape=SHAPE,
            size=(8, 8),
            steps=12,
            visit=visit,
            rate=0.1,
            warmup=3,
            scale=2.0**32,
        )

    def back(some):
        for row in some:
            yield {**row, "regenerated": row["z"]}

    (done,) = boost_joint(make_scaled, back, rows(1), steps=12, every=4)
    *_, updates, scale = done["boost"]
    skipped = 32 - int(torch.tensor(scale).log2())
    assert 0 < skipped < 12
    assert updates == 12 - skipped
    assert done["decodes"] == 3 * len(tried) == 36


def test_a_row_without_a_finite_picture_fails_and_its_neighbours_do_not() -> None:
    def sometimes(z):
        return torch.where(z[:, :1, :1, :1] > 5, torch.nan, decode(z))

    for scale in (None, 2.0**16):
        problem = BoostProblem(sometimes, slots=2, latent_shape=SHAPE, size=(8, 8), steps=12, scale=scale)
        given = rows()
        given[1]["z"] = torch.full(SHAPE, 9.0)
        done = sorted(boost_decoder(lambda visit, problem=problem: problem, given), key=lambda row: row["id"])
        assert [row.get("status") for row in done] == [None, "failed", None]
        assert "boosting diverged" in done[1]["error"]


def test_the_decoder_is_not_shown_empty_slots() -> None:
    shown: list[int] = []

    def seen(z):
        shown.append(len(z))
        return decode(z)

    problem = BoostProblem(seen, slots=2, latent_shape=SHAPE, size=(8, 8), steps=12, rate=0.1, warmup=3)
    done = sorted(boost_decoder(lambda visit: problem, rows()), key=lambda row: row["id"])
    assert shown == [2] * 12 + [1] * 12
    for row, start in zip(done, rows(), strict=True):
        torch.testing.assert_close(row["z"], alone(start), rtol=1e-4, atol=1e-5)
