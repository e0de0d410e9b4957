"""The context loss: the printed formula, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from stages.concepts.losses import context_loss


@pytest.mark.parametrize("form", ["paper", "normalised"])
def test_context_loss_is_the_printed_formula(form):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn((2, 3, 5), generator=generator, dtype=torch.float64, requires_grad=True)
    near = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)
    far = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)
    counts = [[(4, 2), (1, 3), (0, 2)], [(2, 2), (0, 0), (3, 1)]]
    near_there, far_there = (
        torch.tensor([[[m < pair[side] for m in range(4)] for pair in row] for row in counts]) for side in (0, 1)
    )
    loss = context_loss(v, near, far, near_there, far_there, form, 0.5)
    expected = []
    for b in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for i, (p, n) in enumerate(counts[b]):
            if p and n:

                def weight(word, b=b, i=i):
                    if form == "paper":
                        return math.e ** (v[b, i] @ word)
                    return math.e ** (v[b, i] @ word / v[b, i].norm() / word.norm() / 0.5)

                close = sum(weight(near[b, i, m]) for m in range(p))
                away = sum(weight(far[b, i, m]) for m in range(n))
                total = total - torch.log(close / (close + away))
        expected.append(total)
    assert torch.allclose(loss, torch.stack(expected), atol=1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), v)
    (reference,) = torch.autograd.grad(sum(expected), v)
    assert torch.allclose(grad, reference, atol=1e-10)


def test_context_loss_survives_zero_vectors_and_large_products():
    v = torch.zeros((1, 2, 3), requires_grad=True)
    words = torch.full((1, 2, 1, 3), 1e3)
    none = torch.zeros((1, 2, 1), dtype=torch.bool)
    some = ~none
    for form in ("paper", "normalised"):
        (grad,) = torch.autograd.grad(context_loss(v, words, words, none, none, form).sum(), v)
        assert torch.equal(grad, torch.zeros_like(v))
    assert context_loss(v + 1e3, words, -words, some, some, "paper").item() == pytest.approx(0, abs=1e-6)
