"""What a call is said to take, against what autograd keeps on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.models.families import open_latent_model, open_without_weights
from stages.models.latent import LatentModel
from stages.models.memory import Live, fitting, fitting_slots, power_of_two, rows_in
from stages.models.settings import LatentModelSettings
from tests.support import tiny_flows, tiny_stable_diffusion

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


CALLS = [("predict", False), ("predict", True), ("encode", False), ("decode", False), ("decode", True)]


def live(model: LatentModel, call: str, gradient: bool, rows: int) -> int:
    """The most that was alive at once in a call on this machine."""
    geometry = model.geometry
    shape = (3, geometry.height, geometry.width) if call == "encode" else geometry.latent_shape
    x_BCHW = torch.randn(rows, *shape, requires_grad=gradient)
    condition = model.condition(["a star"] * rows)
    run = {
        "predict": lambda: model.predictor()(x_BCHW, torch.full((rows,), 500.0), condition),
        "encode": lambda: model.encode(x_BCHW), "decode": lambda: model.decode(x_BCHW),
    }[call]  # fmt: skip
    with torch.set_grad_enabled(gradient), Live() as told:
        result = run()
        if gradient:
            torch.autograd.grad(result.sum(), x_BCHW)
    return told.peak


@pytest.mark.parametrize("kind", ["sd", "flux-dev"])
def test_what_is_told_without_weights_is_what_a_row_takes(tmp_path: Any, kind: str) -> None:
    build = tiny_flows.build if kind == "flux-dev" else tiny_stable_diffusion.build
    settings = LatentModelSettings(model=build(tmp_path, kind), device="cpu")
    model, blank = open_latent_model(settings), open_without_weights(settings)
    for call, gradient in CALLS:
        said = blank.activation_bytes(call, gradient=gradient)  # type: ignore[arg-type]
        one, three = (live(model, call, gradient, rows) for rows in (1, 3))
        assert said / FACTOR <= (three - one) / 2 <= said * FACTOR, (call, gradient)
        assert said == model.activation_bytes(call, gradient=gradient)  # type: ignore[arg-type]


def test_rows_are_counted_in_the_free_memory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LatentModelSettings(model=tiny_stable_diffusion.build(tmp_path), device="cpu")
    model = open_without_weights(settings)
    each = model.activation_bytes("predict")
    monkeypatch.setattr("stages.models.memory.free_bytes", lambda device: 100 * each)
    assert fitting(model, "predict") == 80
    with_gradient = [model.activation_bytes(call, gradient=True) for call in ("predict", "decode")]
    assert fitting(model, "select") == 80 * each // max(with_gradient)  # neither is alive when the other is
    assert model.rooms["predict"].rows == 80
    assert rows_in(each - 1, each) == 1  # it is tried, whatever was told
    assert [power_of_two(rows) for rows in (0, 1, 3, 63, 64, 1000)] == [1, 1, 2, 32, 64, 64]


def test_what_does_not_fit_otherwise_is_computed_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LatentModelSettings(model=tiny_stable_diffusion.build(tmp_path), device="cpu")

    def opened(free: float) -> LatentModel:
        monkeypatch.setattr("stages.models.memory.free_bytes", lambda device: free)
        return open_without_weights(settings)

    plain = opened(1e12)
    each = plain.activation_bytes("predict", gradient=True)
    assert plain.recompute("predict")
    less = plain.activation_bytes("predict", gradient=True)
    assert less < 0.7 * each
    for rows, free, same in ((1, 1.3 * each, True), (4, 4.8 * each, False)):
        model = opened(free)
        slots = fitting_slots(model, "gradient", otherwise=1, rows=rows)
        assert (model.activation_bytes("predict", gradient=True) == each) == same, (rows, free)
        assert slots == power_of_two(rows_in(int(free), each if same else less) // rows)
    assert not model.recompute("predict")
