"""Blocks that are computed again on the way back: the same numbers, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode

from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.memory import Live
from stages.models.recompute import recompute, recomputes
from stages.models.settings import LatentModelSettings
from tests.support.tiny_families import KINDS, UNETS, build

FACTOR = 1.1


def opened(folder: Path, kind: str) -> LatentModel:
    return open_latent_model(LatentModelSettings(model=build(folder, kind), device="cpu")).at(32, 32)


def gradient(model: LatentModel, call: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What a call gives, its gradient at the latents, and the most that was alive at once, in bytes."""
    z_BCHW = torch.randn(2, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(0))
    z_BCHW.requires_grad_()
    condition = model.condition(["a star", "a hill"])
    with torch.enable_grad(), Live() as live:
        if call == "decode":
            made = model.decode(z_BCHW)
        else:
            made = model.predictor()(z_BCHW, torch.tensor([500.0, 20.0]), condition)
        (slope_BCHW,) = torch.autograd.grad(made.square().sum(), z_BCHW)
    return made.detach(), slope_BCHW, live.peak


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_same_and_takes_less(tmp_path: Path, kind: str) -> None:
    model = opened(tmp_path, kind)
    for call in ("predict", "decode"):
        made, slope, peak = gradient(model, call)
        can = (kind, call) not in (("qwen-image", "decode"), ("qwen-image-21", "decode"))
        assert model.recompute(call) == can, call  # type: ignore[arg-type]
        made_again, slope_again, less = gradient(model, call)
        assert torch.equal(made, made_again)
        assert torch.equal(slope, slope_again)
        if can and (call == "decode" or kind in UNETS):  # a miniature transformer has one or two blocks
            assert less < 0.75 * peak, (call, less, peak)


def test_what_is_told_of_it_is_what_is_alive(tmp_path: Path) -> None:
    model = opened(tmp_path, "sd")
    for call in ("predict", "decode"):
        model.recompute(call)  # type: ignore[arg-type]
        told = 2 * model.activation_bytes(call, gradient=True)  # type: ignore[arg-type]
        assert told / FACTOR < gradient(model, call)[2] < told * FACTOR, call


class Convolutions(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_a_decoder_of_published_shape_keeps_two_fifths_for_one_more_pass() -> None:
    """Stable Diffusion's autoencoder, with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    )  # fmt: skip
    vae.eval().requires_grad_(False)
    z_BCHW = torch.randn(1, 4, 8, 8)

    def run() -> tuple[torch.Tensor, int, int]:
        variable_BCHW = z_BCHW.clone().requires_grad_()
        with Convolutions() as counted, Live() as live:
            (slope_BCHW,) = torch.autograd.grad(vae.decode(variable_BCHW).sample.square().sum(), variable_BCHW)
        return slope_BCHW, live.peak, counted.count

    plain, peak, convolutions = run()
    assert recompute(vae)
    assert recomputes(vae)
    again, less, more = run()
    assert torch.equal(plain, again)
    assert less < 0.4 * peak
    assert convolutions < more <= 2 * convolutions
    with torch.no_grad(), Convolutions() as counted:
        vae.decode(z_BCHW)
    assert counted.count <= convolutions  # without a gradient nothing is done twice


@pytest.mark.parametrize("again", [False, True])
def test_a_gradient_of_a_flow_is_taken_without_cudnn_attention(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass forward, which decides by what the way back goes, and where blocks are computed again; no other."""
    model = open_latent_model(LatentModelSettings(model="micro:flux", device="cpu"))
    if again:
        model.recompute("predict")
    seen: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # PyTorch's own way: no other test may change it
    condition = model.condition(["a red star"])
    seen.clear()
    z_BCHW, t_B = torch.randn(1, *model.geometry.latent_shape), torch.full((1,), 500.0)
    with torch.no_grad():
        model.predictor()(z_BCHW, t_B, condition)
    assert set(seen) == {True}
    passes = len(seen)
    seen.clear()
    z_BCHW.requires_grad_()
    torch.autograd.grad(model.predictor()(z_BCHW, t_B, condition).sum(), z_BCHW)
    assert set(seen) == {False}
    assert len(seen) == (2 if again else 1) * passes
    assert torch.backends.cuda.cudnn_sdp_enabled()
