"""A transformer over two cards gives what it gives on one, to the last bit; what does not fit is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jobs.run import run_spec
from jobs.schema.reading import JobFileError
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models import memory
from stages.models.cards import shares, spread
from stages.models.families import open_latent_model
from stages.models.latent import Place
from tests.support import cards, tiny_flows
from tests.support.rare import picture

TWO = [
    pytest.param(
        "cuda:0,cuda:1",
        marks=(pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")),
    ),
    "card:0,card:1",
]
pytestmark = pytest.mark.card
KINDS = ["flux-dev", "chroma", "flux2-klein", "sd35-medium", "qwen-image", "qwen-image-21", "z-image", "ovis-image"]
"""All families of transformers."""


@pytest.fixture
def two(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param.startswith("card"):
        cards.card()
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", cards.attention)
    return str(request.param)


def told(folder: str, device: str, **options: Any) -> InvertImagesSettings:
    return InvertImagesSettings(model=folder, device=device, **{"size": 16, "steps": 2, **options})


def answers(folder: str, device: str, **options: Any) -> list[torch.Tensor]:
    """Conditions, velocities, their gradient, the same with blocks that are computed again; a picture and back."""
    model = open_latent_model(told(folder, device, **options))
    condition = model.condition(["a red star", "blue heart"])
    assert {value.device for value in condition.values()} == {model.device}
    z_BCHW = torch.randn(2, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    t_B, found = torch.tensor([900.0, 200.0], device=model.device), list(condition.values())
    for _ in "ab":
        z_BCHW = z_BCHW.detach().requires_grad_()
        v_BCHW = model.predictor()(z_BCHW, t_B, condition)
        found += [v_BCHW, *torch.autograd.grad(v_BCHW.square().sum(), z_BCHW)]
        model.recompute("predict")
    x_BCHW = model.decode(z_BCHW.detach())
    found += [x_BCHW, model.encode(x_BCHW)]
    assert {one.device for one in found} == {model.device}
    return [one.detach().cpu() for one in found]


@pytest.mark.parametrize("two", TWO, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_two_cards_give_what_one_gives(tmp_path: Path, two: str, kind: str) -> None:
    folder = tiny_flows.build(tmp_path, kind)
    size = 32 if kind == "qwen-image-21" else 16
    model: Any = open_latent_model(told(folder, two, size=size))
    first, second = (torch.device(name) for name in two.split(","))
    assert list(model.lies("predict")) == [first, second]
    assert (model.device, model.vae.device, model.reads_on) == (first, first, second)
    assert {encoder.device for part, encoder in vars(model.pipeline).items() if part.startswith("text")} <= {second}
    both = [answers(folder, device, size=size) for device in (two, two.split(",")[0])]
    for ours, theirs in zip(*both, strict=True):
        # What all blocks of Z-Image are told gets its gradient of one card after that of the other.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if kind == "z-image" else 0)


@pytest.mark.parametrize("two", TWO, indirect=True)
def test_a_whole_inversion_over_two_cards(tmp_path: Path, two: str) -> None:
    """With gradients through model and autoencoder; text encoders wait elsewhere."""
    folder = tiny_flows.build(tmp_path, "flux-dev")
    method = {"method": "lbo", "passes": 4, "tolerance": 1e-9, "ilb": {"steps": 1, "warmup": 1}}
    given = [{"id": "0", "image": picture(0), "prompt": "red star", "method": "lbo"}]
    found = []
    for device in (two, two.split(",")[0]):
        (row,) = InvertImages(told(folder, device, methods=[method], offload="text-encoders"))(given)
        assert row["status"] == "ok", row["error"]
        found.append(torch.from_numpy(row["latent"]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def adapter(folder: str, file: Path) -> str:
    """A LoRA of every attention of the transformer, named as diffusers names it."""
    generator, state = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name, layer in open_latent_model(told(folder, "cpu")).transformer.named_modules():  # type: ignore[attr-defined]
        if isinstance(layer, torch.nn.Linear) and ".attn.to_" in name:
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    save_file(state, file)
    return str(file)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("two", TWO, indirect=True)
def test_adapters_on_two_cards_give_what_they_give_on_one(tmp_path: Path, two: str) -> None:
    folder = tiny_flows.build(tmp_path / "flux", "flux-dev")
    loras = ({"path": adapter(folder, tmp_path / "adapter.safetensors"), "weight": 0.3},)
    model: Any = open_latent_model(told(folder, two, loras=loras))
    assert [str(device) for device in model.lies("predict")] == two.split(",")
    both = [answers(folder, device, loras=loras) for device in (two, two.split(",")[0])]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    bare = answers(folder, two)
    at = next(i for i, value in enumerate(bare) if value.shape == (2, *model.geometry.latent_shape))
    assert not torch.allclose(bare[at], both[0][at], atol=1e-3)


@pytest.mark.parametrize("two", TWO, indirect=True)
def test_a_quantised_model_is_read_onto_its_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: str) -> None:
    """Its quantiser is told where each part goes, and nothing is moved there afterwards."""
    seen: dict[str, Any] = {}
    plain = Place.load

    def load(place: Place, kind: Any, dtype: Any, **options: Any) -> Any:
        if options.pop("quantization_config", None) is not None:
            seen[place.folder] = options["device_map"]
        return plain(place, kind, dtype, **options)

    monkeypatch.setattr(Place, "load", load)
    monkeypatch.setattr("stages.models.quantized.installed", lambda library: True)
    monkeypatch.setattr("stages.models.cards.free_bytes", lambda device: 1000)  # what is quantised may be smaller
    folder, eight = tiny_flows.build(tmp_path, "flux-dev"), {"load_in_8bit": True}
    first, second = two.split(",")
    config = {"transformer": eight, "text_encoder_2": eight}
    model: Any = open_latent_model(told(folder, two, quantization_config=config))
    assert seen["text_encoder_2"] == {"": second}
    assert set(seen["transformer"].values()) == {first, second}
    assert [str(device) for device in model.lies("predict")] == [first, second]
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    loras = ({"path": str(tmp_path / "adapter.safetensors")},)
    with pytest.raises(ValueError, match="a quantised transformer takes no `loras` on several cards"):
        open_latent_model(told(folder, two, quantization_config=config, loras=loras))


def test_adapters_of_a_quantised_model_on_several_cards_are_refused_while_planning(tmp_path: Path) -> None:
    from jobs.kinds.invert_images import InvertImages as Job

    given = Job.model_validate({
        "input": str(tmp_path), "model": "black-forest-labs/FLUX.1-dev", "resources": {"gpus": 2},
        "loras": [{"path": "org/lora"}], "quantization_config": {"transformer": {"load_in_8bit": True}},
    })  # fmt: skip
    with pytest.raises(JobFileError, match=r"loras: the quantised transformer .* \(resources.gpus: 2\): leave out"):
        run_spec(given, str(tmp_path / "out"))


def test_as_much_room_is_left_on_one_card_as_on_another() -> None:
    assert shares(24, [20, 20]) == [12, 12]
    assert shares(24, [20, 10]) == [17, 7]
    assert shares(10, [20, 8]) == [10, 0]
    assert shares(9, [6, 2, 10]) == [2.5, 0, 6.5]
    with pytest.raises(ValueError, match="do not fit"):
        shares(31, [20, 10])


def test_blocks_stay_whole_and_in_order() -> None:
    network = torch.nn.Module()
    network.first, network.blocks = torch.nn.Linear(4, 4), torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in "abcd")
    network.rope, network.last = torch.nn.Identity(), torch.nn.Linear(4, 4)
    lies = spread(network, ["a", "b"], [10_000, 10_000])
    assert lies == {"first": "a", "blocks.0": "a", "blocks.1": "a", "blocks.2": "b", "blocks.3": "b", "rope": "a",
                    "last": "b"}  # fmt: skip
    assert spread(network, ["a", "b"], [10_000, 1_000]) == dict.fromkeys(lies, "a")


def test_what_fits_no_cards_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_flows.build(tmp_path, "flux-dev")
    monkeypatch.setattr("stages.models.cards.free_bytes", lambda device: 1000)
    with pytest.raises(
        ValueError, match=r"its transformer does not fit on card:0, card:1 .* take more `resources.gpus`"
    ):
        open_latent_model(told(folder, f"{cards.card(0)},{cards.card(1)}"))


def test_the_fullest_card_says_how_many_rows_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for a gradient lies where the blocks lie; a pass alone takes as much on each card."""
    folder = tiny_flows.build(tmp_path, "flux-dev")
    model = open_latent_model(told(folder, f"{cards.card(0)},{cards.card(1)}"))
    first, second = model.lies("predict").values()
    assert first + second == pytest.approx(1)
    free = {0: 50_000_000, 1: 20_000_000}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.index])
    plain, kept = (model.activation_bytes("predict", gradient=gradient) for gradient in (False, True))
    assert memory.fitting(model, "predict") == int(0.8 * 20_000_000) // plain
    assert memory.fitting(model, "gradient") == min(
        int(0.8 * free[card]) // int(kept * share) for card, share in ((0, first), (1, second))
    )
    each = int(1.1 * model.activation_bytes("decode"))  # with what its kernels take for themselves
    assert memory.fitting(model, "decode") == int(0.8 * 50_000_000) // each


def test_a_dry_run_says_what_lies_where(tmp_path: Path) -> None:
    from jobs.dry_run import memory_of
    from jobs.kinds.invert_images import InvertImages

    folder = tiny_flows.build(tmp_path, "flux-dev")
    job = InvertImages(input="x", model=folder, size=16, resources={"gpus": 2})  # type: ignore[arg-type]
    said = memory_of(job)
    assert "64, 64, 64 of 2 cards of 24, 40, 80 GB (the transformer over all, " in said
    assert "text encoders on the last)" in said
    assert "IDLE" not in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.dry_run.CARDS", (1e-6, 1e-6, 1e-6))
        assert "FIT NONE OF THEM: take more than 2 GPU a worker" in memory_of(job)
