"""Image Latent Boosting against torch's own Adam, and the joint form's bookkeeping."""

from __future__ import annotations

import torch

from stages.inversion.ilb import BoostProblem, boost_decoder, boost_joint, cosine_rate

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
    return BoostProblem(decode, slots=2, latent_shape=SHAPE, size=8, steps=steps, visit=visit, rate=0.1, warmup=3)


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
