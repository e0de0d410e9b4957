"""What a call is said to take, against what autograd keeps on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.support import tiny_stable_diffusion

FACTOR = 1.1
"""The estimate adds what the backward pass itself makes to what the forward pass keeps."""


def kept(call: Any, given: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of a call, weights and input aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(storage.nbytes() for storage in found.values())
    del result
    return total


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_estimate_of_a_row_is_what_autograd_keeps(tmp_path: Any, kind: str) -> None:
    model = open_latent_model(LatentModelSettings(model=tiny_stable_diffusion.build(tmp_path, kind), device="cpu"))
    condition, t_B = model.condition([""]), torch.tensor([500])
    z_BCHW = torch.randn((1, 4, 8, 8), requires_grad=True)
    x_BCHW = torch.randn((1, 3, 16, 16), requires_grad=True)
    calls = {
        "predict": (lambda: model.predictor()(z_BCHW, t_B, condition), model.pipeline.unet),
        "decode": (lambda: model.decode(z_BCHW), model.pipeline.vae),
        "encode": (lambda: model.encode(x_BCHW), model.pipeline.vae),
    }
    for name, (call, network) in calls.items():
        measured = kept(call, [z_BCHW, x_BCHW, *network.parameters(), *condition.values()])
        said = model.activation_bytes(name, gradient=True)
        assert measured / FACTOR <= said <= measured * FACTOR, name
        assert 0 < model.activation_bytes(name) < said / 2, name


def test_it_grows_with_the_picture_and_halves_with_the_type(tmp_path: Any) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)

    def said(**options: Any) -> int:
        return open_latent_model(LatentModelSettings(model=folder, device="cpu", **options)).activation_bytes("predict")

    assert 3 < said(size=32) / said() < 5
    assert said(dtype="bfloat16") < 0.7 * said()
