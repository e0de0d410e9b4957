"""Checkpoints of one file give the model that a folder gives, and say what they lack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from stages.models.families import open_latent_model, read_geometry
from stages.models.one_file import configuration_of
from stages.models.settings import LatentModelSettings
from tests.support import one_file, tiny_stable_diffusion
from tests.support.card_lines import check_card_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_stable_diffusion.build(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def file(folder: str) -> str:
    return one_file.write(folder, Path(folder).with_name("model.safetensors"))


@pytest.fixture(scope="module")
def config(folder: str) -> str:
    """The folder without its weights, as the hub's cache has it."""
    target = Path(folder).with_name("config")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(target)


def settings(file: str, config: str | None, **options: Any) -> LatentModelSettings:
    return LatentModelSettings(model=file, config=config, device="cpu", **options)


def test_it_is_the_folders_model_to_the_bit(folder: str, file: str, config: str) -> None:
    one, whole = (
        open_latent_model(given) for given in (settings(file, config), LatentModelSettings(model=folder, device="cpu"))
    )
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(model.pipeline, part).state_dict() for model in (one, whole))  # type: ignore[attr-defined]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), part
    assert one.geometry.latent_shape == whole.geometry.latent_shape
    assert one.geometry.scheduler == whole.geometry.scheduler
    condition = one.condition(["red star"])
    assert torch.equal(condition["text_BLE"], whole.condition(["red star"])["text_BLE"])


def test_sdxl_s_two_text_encoders_are_found_in_it(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path / "sdxl", "sdxl")
    file = one_file.write(folder, tmp_path / "xl.safetensors", "sdxl")
    one, whole = (
        open_latent_model(given) for given in (settings(file, folder), LatentModelSettings(model=folder, device="cpu"))
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        found, wanted = (getattr(model.pipeline, part).state_dict() for model in (one, whole))  # type: ignore[attr-defined]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), part
    assert len({known["fingerprint"] for known in one.geometry.fingerprints().values()}) == 4
    condition = one.condition(["red star"])
    assert all(torch.equal(condition[name], value) for name, value in whole.condition(["red star"]).items())


def test_the_autoencoder_runs_in_float32_beside_half_precision(file: str, config: str) -> None:
    model = open_latent_model(settings(file, config, dtype="float16"))
    assert (model.dtypes["unet"], model.dtypes["text_encoder"]) == (torch.float16, torch.float16)
    assert model.dtypes["vae"] == torch.float32


def test_its_fingerprint_is_the_files(file: str, config: str, tmp_path: Path) -> None:
    before = read_geometry(settings(file, config)).fingerprints()
    moved = str(shutil.copy(file, tmp_path / "other.safetensors"))
    after = read_geometry(settings(moved, config)).fingerprints()
    assert {part: known["fingerprint"] for part, known in after.items()} == {
        part: known["fingerprint"] for part, known in before.items()
    }
    assert len({known["fingerprint"] for known in before.values()}) == 3
    state = load_file(moved)
    state["model.diffusion_model.out.2.bias"] += 1
    save_file(state, moved, metadata={"format": "pt"})
    changed = read_geometry(settings(moved, config)).fingerprints()
    assert changed["unet"]["fingerprint"] != before["unet"]["fingerprint"]


def test_the_lines_of_its_card_make_the_same_model(file: str, config: str) -> None:
    model = open_latent_model(settings(file, config))
    check_card_lines(model)


def test_its_configuration_is_found_by_its_shapes_and_asked_for_without_the_hub(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configuration_of(file) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"one file, without its configuration.*set `config` to a folder or hub id"):
        read_geometry(settings(file, None))


def test_what_is_no_checkpoint_or_lacks_a_network_is_refused(
    folder: str, file: str, config: str, tmp_path: Path
) -> None:
    without_vae = one_file.write(folder, tmp_path / "no_vae.safetensors", leave_out="first_stage_model")
    with pytest.raises(ValueError, match="holds no autoencoder: name one with `vae`"):
        read_geometry(settings(without_vae, config))
    assert open_latent_model(settings(without_vae, config, vae=folder)).geometry.parts["vae"].identity()["path"]
    without_text = one_file.write(folder, tmp_path / "no_text.safetensors", leave_out="cond_stage_model")
    with pytest.raises(ValueError, match="holds no text encoder"):
        read_geometry(settings(without_text, config))
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="a LoRA belongs in `loras`"):
        read_geometry(settings(str(tmp_path / "lora.safetensors"), config))
    (tmp_path / "cut.safetensors").write_bytes(Path(file).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no safetensors file"):
        read_geometry(settings(str(tmp_path / "cut.safetensors"), config))
    with pytest.raises(ValueError, match="there is no file /nowhere"):
        read_geometry(settings("/nowhere/model.safetensors", config))
    with pytest.raises(ValidationError, match="config: belongs to a model of one"):
        LatentModelSettings(model=folder, config=config)
