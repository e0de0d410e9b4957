"""New noise of a row."""

from __future__ import annotations

import torch

from stages.engine.randomness import row_generator
from stages.rare.candidates import new_noise
from stages.rare.noise import slerp
from tests.support.rare import method


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [row_generator(seed, str(number), "0") for number in range(count)]


def test_new_seeds_are_the_formulas_at_their_weights() -> None:
    z = torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    noise, none = new_noise(method("random"), z, generators(4))
    assert float(none.abs().max()) == 0
    torch.testing.assert_close(noise[2], torch.randn((4, 4, 4), generator=generators(3)[2]))
    made, weights = new_noise(method("slerp", margin=0.1), z, generators(40))
    assert bool((weights.sum(1) - 1).abs().max() < 1e-6)
    assert bool(((weights > 0).sum(1) == 2).all())
    for own, weight in zip(made, weights, strict=True):
        first, second = weight.nonzero().flatten().tolist()
        assert 0.1 <= float(weight[second]) <= 0.9
        wanted = slerp(weight[second : second + 1], z[first].view(1, -1), z[second].view(1, -1))
        torch.testing.assert_close(own.view(1, -1), wanted, atol=1e-5, rtol=1e-5)
    made, weights = new_noise(method("linear"), z, generators(2000))
    torch.testing.assert_close(weights.sum(1), torch.ones(2000))
    # Uniform on the simplex: each weight has mean 1/3 and variance 1/18.
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    torch.testing.assert_close(weights.var(0), torch.full((3,), 1 / 18), atol=0.005, rtol=0)
    wanted = torch.einsum("bk,kchw->bchw", weights, z) / weights.square().sum(1).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    made, weights = new_noise(method("nao", margin=0.4, iterations=30), z, generators(50))
    assert bool(((weights > 0).sum(1) == 1).all())
    assert float(weights.max()) <= 0.6
    nearest = torch.nn.functional.cosine_similarity(made.flatten(1)[:, None], z.flatten(1)[None], dim=2).argmax(1)
    assert float((nearest == weights.argmax(1)).float().mean()) > 0.8  # a path leads towards its own reference


def test_blended_seeds_of_a_concept_share_their_low_frequencies_alone() -> None:
    z = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    whole, _ = new_noise(method("linear"), z, generators(6))
    made, weights = new_noise(method("linear", blend={"low": 0.25}), z, generators(6))
    assert weights.shape == (6, 2)
    waves = torch.fft.fft2(made.double())
    for number, other in ((0, 1), (2, 5)):
        torch.testing.assert_close(waves[number, :, :3, :3], waves[other, :, :3, :3], atol=1e-4, rtol=0)
        assert float((waves[number, :, 3:8] - waves[other, :, 3:8]).abs().mean()) > 5
    fresh, _ = new_noise(method("random"), z, generators(6))
    torch.testing.assert_close(waves[:, :, 5], torch.fft.fft2(fresh.double())[:, :, 5], atol=1e-4, rtol=0)
    assert float((whole - made).abs().mean()) > 0.1
