"""Row-wise loss scaling under float16 on the CPU, against gradients in float32."""

import pytest
import torch
from torch import nn

from stages.engine.gradients import FLOAT16_SCALE, RowGradient

B, D = 5, 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))


def variable():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def losses(net, x, weight, half):
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        out = net(x).float()
    return out.square().sum(1) * weight


def exact(net, weight):
    x = variable()
    return torch.autograd.grad(losses(net, x, weight, half=False).sum(), x)[0]


def test_small_gradients_survive_float16():
    net, weight = network(), torch.full((B,), 1e-7)
    wanted = exact(net, weight)
    x = variable()
    lost, skip = RowGradient(B)(losses(net, x, weight, half=True), x)
    assert (lost == 0).float().mean() > 0.9  # what the scale is for
    assert not skip.any()
    gradient = RowGradient(B, FLOAT16_SCALE)
    x = variable()
    found, skip = gradient(losses(net, x, weight, half=True), x)
    assert not skip.any()
    assert (gradient.scale_B == FLOAT16_SCALE).all()
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_row_that_overflows_halves_its_own_scale_until_it_fits():
    net, weight = network(), torch.tensor([1e-7, 1e-7, 300.0, 1e-7, 1e-7])
    wanted = exact(net, weight)
    gradient = RowGradient(B, FLOAT16_SCALE)
    others = [b for b in range(B) if b != 2]
    skips = 0
    while skips < 20:
        x = variable()
        found, skip = gradient(losses(net, x, weight, half=True), x)
        assert not skip[others].any()
        for b in others:
            assert (found[b] - wanted[b]).abs().max() < 0.02 * wanted[b].abs().max()
        if not skip[2]:
            break
        assert (found[2] == 0).all()
        skips += 1
    assert skips > 1
    assert (gradient.scale_B[others] == FLOAT16_SCALE).all()
    assert gradient.scale_B[2] == FLOAT16_SCALE / 2**skips
    assert (found[2] - wanted[2]).abs().max() < 0.02 * wanted[2].abs().max()


def test_inactive_rows_keep_their_scale_and_reset_gives_it_back():
    gradient = RowGradient(3, 4.0)
    address = gradient.scale_B.data_ptr()
    x = torch.tensor([[1.0], [1.0], [1.0]], requires_grad=True)
    loss = (x[:, 0] * torch.tensor([1.0, torch.inf, torch.inf])).nan_to_num(posinf=torch.inf)
    _, skip = gradient(loss, x, active_B=torch.tensor([True, True, False]))
    assert skip.tolist() == [False, True, True]
    assert gradient.scale_B.tolist() == [4.0, 2.0, 4.0]
    gradient.reset([1])
    assert gradient.scale_B.tolist() == [4.0, 4.0, 4.0]
    assert gradient.scale_B.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_scale_the_gradient_is_autograds(dtype):
    net, weight = network(), torch.linspace(0.1, 2, B)
    x, y = variable(), variable()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine, theirs = (net(v).float().square().sum(1) * weight for v in (x, y))
    found, skip = RowGradient(B)(mine, x)
    assert torch.equal(found, torch.autograd.grad(theirs.sum(), y)[0])
    assert not skip.any()


def test_a_broken_row_without_a_scale_is_left_to_the_stopping_rule():
    x = torch.ones(2, 1, requires_grad=True)
    found, skip = RowGradient(2)(x[:, 0] * torch.tensor([1.0, torch.nan]), x)
    assert found[0].item() == 1.0
    assert found[1].isnan().all()
    assert not skip.any()
