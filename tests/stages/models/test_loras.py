"""LoRA adapters are added as their definition says, count in the fingerprint, and are refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages.models.families import open_latent_model, read_geometry
from stages.models.latent import LatentModel
from stages.models.settings import LatentModelSettings
from tests.support import tiny_stable_diffusion
from tests.support.card_lines import check_card_lines

RANK, ALPHA = 2, 1.0
PARTS = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
Updates = dict[tuple[str, str], torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: tiny_stable_diffusion.build(tmp_path_factory.mktemp(kind) / kind, kind) for kind in ("sd", "sdxl")}


def settings(folder: str, *loras: dict[str, Any], **options: Any) -> LatentModelSettings:
    told = {"loras": list(loras)} if loras else {}
    return LatentModelSettings.model_validate({"model": folder, "device": "cpu", **told, **options})


def opened(folder: str, *loras: dict[str, Any]) -> LatentModel:
    return open_latent_model(settings(folder, *loras))


def kohya(model: LatentModel, file: Path, kind: str, seed: int = 0) -> Updates:
    """Write an adapter of all attentions, named as kohya's trainer names it; (part, layer) -> what it adds."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    added: Updates = {}
    for part in model.geometry.parts.keys() - {"vae"}:
        prefix = "lora_te1" if (part, kind) == ("text_encoder", "sdxl") else PARTS[part]
        network: nn.Module = getattr(model.pipeline, part)  # type: ignore[attr-defined]
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Linear) or not ("self_attn" in name or (".attn" in name and "to_" in name)):
                continue
            down = 0.1 * torch.randn(RANK, layer.in_features, generator=generator)
            up = 0.1 * torch.randn(layer.out_features, RANK, generator=generator)
            own = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            key = f"{prefix}_{own.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
            added[part, name] = ALPHA / RANK * up @ down
    save_file(state, file)
    return added


def test_what_is_no_adapter_is_refused_before_anything_is_loaded(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no safetensors file /nowhere/x\.safetensors"):
        read_geometry(settings(folders["sd"], {"path": "/nowhere/x.safetensors"})).fingerprints()
    (tmp_path / "style.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="there is no safetensors file"):
        read_geometry(settings(folders["sd"], {"path": str(tmp_path / "style.bin")})).fingerprints()


def test_without_adapters_nothing_changes(folders: dict[str, str]) -> None:
    assert "loras" not in settings(folders["sd"]).model_dump()
    assert read_geometry(settings(folders["sd"])).loras == ()


class TestWithPeft:
    """diffusers leaves adapters to peft."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("peft")

    @pytest.mark.parametrize("kind", ["sd", "sdxl"])
    def test_each_layer_gains_its_scaled_product(self, folders: dict[str, str], tmp_path: Path, kind: str) -> None:
        """W + weight alpha / r B A (Hu et al., 2022), by hand; two adapters add up."""
        plain = opened(folders[kind])
        first, second = (kohya(plain, tmp_path / f"{seed}.safetensors", kind, seed) for seed in (0, 1))
        loras = [{"path": str(tmp_path / "0.safetensors"), "weight": 0.7}, {"path": str(tmp_path / "1.safetensors")}]
        with_both = opened(folders[kind], *loras)
        changed = set()
        for part in plain.geometry.parts:
            before, after = (
                dict(getattr(model.pipeline, part).named_parameters())  # type: ignore[attr-defined]
                for model in (plain, with_both)
            )
            assert before.keys() == after.keys()
            for name, value in before.items():
                key = (part, name.removesuffix(".weight"))
                wanted = value + 0.7 * first[key] + second[key] if key in first else value
                torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-6)
                changed |= {part} if not torch.equal(after[name], value) else set()
        assert changed == plain.geometry.parts.keys() - {"vae"}

    def test_they_count_in_the_fingerprints(self, folders: dict[str, str], tmp_path: Path) -> None:
        kohya(opened(folders["sd"]), tmp_path / "a.safetensors", "sd")

        def prints(*loras: dict[str, Any]) -> dict[str, str]:
            found = read_geometry(settings(folders["sd"], *loras)).fingerprints()
            return {part: known["fingerprint"] for part, known in found.items()}

        path = str(tmp_path / "a.safetensors")
        plain, full, half = prints(), prints({"path": path}), prints({"path": path, "weight": 0.5})
        assert plain["vae"] == full["vae"] == half["vae"]
        for part in ("unet", "text_encoder"):
            assert len({plain[part], full[part], half[part]}) == 3
        (tmp_path / "folder").mkdir()
        (tmp_path / "a.safetensors").rename(tmp_path / "folder/pytorch_lora_weights.safetensors")
        assert prints({"path": str(tmp_path / "folder")}) == full

    def test_the_lines_of_a_card_add_them_too(self, folders: dict[str, str], tmp_path: Path) -> None:
        kohya(opened(folders["sd"]), tmp_path / "a.safetensors", "sd")
        model = opened(folders["sd"], {"path": str(tmp_path / "a.safetensors"), "weight": 0.8})
        check_card_lines(model)

    def test_an_adapter_of_another_model_is_refused(self, folders: dict[str, str], tmp_path: Path) -> None:
        kohya(opened(folders["sdxl"]), tmp_path / "xl.safetensors", "sdxl")
        with pytest.raises(ValueError, match=r"xl\.safetensors' does not fit this model"):
            opened(folders["sd"], {"path": str(tmp_path / "xl.safetensors")})
        save_file({"weight": torch.zeros(2)}, tmp_path / "none.safetensors")
        with pytest.raises(ValueError, match=r"none\.safetensors' cannot be read"):
            opened(folders["sd"], {"path": str(tmp_path / "none.safetensors")})


def test_without_peft_the_message_says_what_to_install(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kohya(opened(folders["sd"]), tmp_path / "a.safetensors", "sd")
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(ValueError, match=r"pip install 'latentmill\[lora\]'"):
        opened(folders["sd"], {"path": str(tmp_path / "a.safetensors")})
