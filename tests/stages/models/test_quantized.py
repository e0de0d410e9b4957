"""Quantised networks: configurations are handed to diffusers and transformers, one sentence where that cannot be, and
weights that torchao has rounded, where it is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.inversion.stock import Stock
from stages.models import quantized
from stages.models.families import open_latent_model, read_geometry
from stages.models.sampler import sample
from stages.models.settings import LatentModelSettings
from tests.support import tiny_flows, tiny_stable_diffusion

EIGHT = {"load_in_8bit": True, "llm_int8_threshold": 5.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    flux = tiny_flows.build(tmp_path_factory.mktemp("flux"), "flux-dev")
    return {"flux": flux, "sd": tiny_stable_diffusion.build(tmp_path_factory.mktemp("sd"))}


@pytest.mark.parametrize(("kind", "denoiser", "encoder"), [("flux", "transformer", "text_encoder_2"),
                                                           ("sd", "unet", "text_encoder")])  # fmt: skip
def test_each_part_is_read_with_its_configuration(
    folders, monkeypatch: pytest.MonkeyPatch, kind: str, denoiser: str, encoder: str
) -> None:
    import diffusers
    import transformers

    seen: dict[str, Any] = {}
    owners = [diffusers.FluxTransformer2DModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL,
              transformers.T5EncoderModel, transformers.CLIPTextModel]  # fmt: skip
    for owner in owners:
        plain = owner.from_pretrained

        def read(path: Any, *given: Any, plain: Any = plain, **options: Any) -> Any:
            seen[options["subfolder"]] = options.pop("quantization_config", None)
            return plain(path, *given, **options)

        monkeypatch.setattr(owner, "from_pretrained", read)
    monkeypatch.setattr(quantized, "installed", lambda library: True)
    asked = {denoiser: EIGHT, encoder: EIGHT}
    open_latent_model(LatentModelSettings(model=folders[kind], quantization_config=asked))
    assert isinstance(seen[denoiser], diffusers.BitsAndBytesConfig)
    assert isinstance(seen[encoder], transformers.BitsAndBytesConfig)
    for part in (denoiser, encoder):
        assert (seen[part].load_in_8bit, seen[part].llm_int8_threshold) == (True, 5.0)
    assert {part for part, config in seen.items() if config is not None} == set(asked)


def test_a_card_s_lines_quantise_alike(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(quantized, "installed", lambda library: True)
    asked = {"transformer": EIGHT, "text_encoder_2": EIGHT}
    geometry = read_geometry(LatentModelSettings(model=folders["flux"], quantization_config=asked))
    names, load = geometry.usage.regenerating()
    given: dict[str, Any] = {}

    def read(path: str, **options: Any) -> str:
        given.update(options)
        return "the pipeline"

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", read)
    names_there: dict[str, Any] = {}
    exec(f"import torch\nfrom diffusers import {', '.join(names)}\n{load}", names_there)
    assert names_there["pipe"] == "the pipeline"
    found = given["quantization_config"].quant_mapping
    assert {part: config.llm_int8_threshold for part, config in found.items()} == dict.fromkeys(asked, 5.0)


def test_what_cannot_be_quantised_is_said_in_a_sentence(folders, tmp_path: Path) -> None:
    def refused(said: str, model: str = folders["flux"], **asked: Any) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            read_geometry(LatentModelSettings(model=model, quantization_config=asked))
        assert "\n" not in str(caught.value)

    refused("has no 'vae' that can be quantised; it has transformer, text_encoder, text_encoder_2", vae=EIGHT)
    refused("has no 'unet' that can be quantised", unet=EIGHT)
    refused("has no 'transformer' that can be quantised; it has unet, text_encoder", folders["sd"], transformer=EIGHT)
    refused("transformer names no method that is known", transformer={"bits": 4})
    refused("transformer names no method that is known", transformer={"quant_method": "gguf"})
    with pytest.raises(ValueError, match="is one file"):
        quantized.check_quantization({"unet": EIGHT}, "a.safetensors", ["unet"], (), "auto", one_file=True)


def test_a_configuration_that_the_library_does_not_take_is_said_when_it_is_planned(
    folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "installed", lambda library: True)
    asked = {"transformer": {**EIGHT, "llm_int8_threshold": "high"}}
    with pytest.raises(ValueError, match="transformer: bitsandbytes does not take this configuration: llm_int8"):
        read_geometry(LatentModelSettings(model=folders["flux"], quantization_config=asked))
    with pytest.raises(ValueError, match="runs on GPUs alone; leave out `device: cpu`, or take quant_method: torchao"):
        read_geometry(
            LatentModelSettings(model=folders["flux"], device="cpu", quantization_config={"transformer": EIGHT})
        )


def test_a_library_that_is_missing_is_named(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "installed", lambda library: False)
    with pytest.raises(ValueError, match="transformer asks for bitsandbytes, which is not installed: pip install"):
        read_geometry(LatentModelSettings(model=folders["flux"], quantization_config={"transformer": EIGHT}))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_rounds_the_weights_and_latents_stay_float32(folders) -> None:
    """Eight bits, a scale for each output channel, against rounding by hand; and the card's lines do the same."""
    rounding = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    int8 = {"quant_method": "torchao", "quant_type": {"default": rounding}}
    told = {"model": folders["flux"], "device": "cpu"}
    plain = open_latent_model(LatentModelSettings(**told))
    model = open_latent_model(LatentModelSettings(**told, quantization_config={"transformer": int8}))
    z = torch.randn(2, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(1))
    t, condition = torch.tensor([700.0, 300.0]), plain.condition(["red star", ""])
    before = plain.predictor()(z, t, condition)
    with torch.no_grad():
        for layer in plain.transformer.modules():
            if isinstance(layer, torch.nn.Linear):
                scale = layer.weight.abs().amax(1, keepdim=True) / 127.5
                layer.weight.copy_((layer.weight / scale).round().clamp(-128, 127) * scale)
        made = model.predictor()(z, t, condition)
    assert made.dtype == torch.float32
    wanted = plain.predictor()(z, t, condition)
    assert float((made - wanted).norm()) < 0.2 * float((before - wanted).norm())
    drawn = Stock(model, "float32")(z, ["red star", ""], 2, 1.0)
    again = model.decode(sample(model.predictor(), model.schedule(2), z, condition))
    torch.testing.assert_close(drawn, again.clamp(-1, 1), rtol=1e-3, atol=1e-4)
