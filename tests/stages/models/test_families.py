"""Which family a folder is of: nothing is taken for its relative."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.models.families import FLOWS, family_of, read_geometry
from stages.models.settings import LatentModelSettings
from stages.models.unet import StableDiffusion, StableDiffusionXL
from tests.support import tiny_flows, tiny_stable_diffusion

BESIDE = "one that takes a picture beside the text"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    built = {kind: tiny_stable_diffusion.build(root / kind, kind) for kind in ("sd", "sdxl")}
    return built | {kind: tiny_flows.build(root / kind, kind) for kind in ("flux-dev", "qwen-image")}


def relative(folder: str, target: Path, pipeline: str, **changes: dict[str, Any]) -> str:
    """A copy whose index names another pipeline, with other values in its parts' configurations."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, values in changes.items():
        file = target / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    return str(target)


def test_of_all_pipelines_of_diffusers_those_are_taken_that_are_known(tmp_path: Path) -> None:
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    assert len(names) > 250
    taken: dict[str, type] = {}
    for name in names:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1"}))
        try:
            taken[name] = family_of(LatentModelSettings(model=str(tmp_path)))
        except ValueError as refused:
            said = rf"is a {name}; inversion knows Stable Diffusion 1.x, 2.x, SDXL and {', '.join(FLOWS)}$"
            assert re.search(said, str(refused)), refused  # noqa: PT017
    unets = {name for name in names if re.match("StableDiffusion(?!3)", name)}
    assert taken.keys() == FLOWS.keys() | unets | {"LatentConsistencyModelPipeline"}
    assert all(taken[name].index == name for name in FLOWS)  # type: ignore[attr-defined]
    xl = {name for name in unets if name.startswith("StableDiffusionXL")}
    assert {taken[name] for name in xl} == {StableDiffusionXL}
    assert {taken[name] for name in taken.keys() - xl - FLOWS.keys()} == {StableDiffusion}


@pytest.mark.parametrize(("kind", "pipeline", "changes", "said"), [
    # Rectified flows: classes with another network, and networks of relatives under the family's own class.
    ("flux-dev", "FluxFillPipeline", {"transformer": {"in_channels": 384}}, "is a FluxFillPipeline; inversion knows"),
    ("flux-dev", "FluxKontextPipeline", {}, "is a FluxKontextPipeline; inversion knows .* FluxPipeline"),
    ("flux-dev", "['pipeline', 'MyFluxPipeline']", {}, r"is a \['pipeline', 'MyFluxPipeline'\]; inversion knows"),
    ("flux-dev", "FluxPipeline", {"transformer": {"in_channels": 384}}, "takes 96 channels, its autoencoder gives 16"),
    ("flux-dev", "FluxPipeline", {"transformer": {"in_channels": 128}}, "takes 32 channels, its autoencoder gives 16"),
    ("flux-dev", "ChromaPipeline", {}, "its transformer is a FluxTransformer2DModel, not a ChromaTransformer2DModel"),
    ("flux-dev", "FluxPipeline", {"vae": {"in_channels": 4}}, "its autoencoder takes 4 channels, and a picture has 3"),
    ("qwen-image", "QwenImageLayeredPipeline", {}, "is a QwenImageLayeredPipeline; inversion knows"),
    ("qwen-image", "QwenImagePipeline", {"vae": {"input_channels": 4}}, "its autoencoder takes 4 channels"),
    ("qwen-image", "QwenImage21Pipeline", {}, "model .* lacks its processor, which a QwenImage21Pipeline consists of"),
    # U-Nets, whose pipelines are told by how their names begin.
    ("sd", "StableDiffusionInpaintPipeline", {"unet": {"in_channels": 9}}, f"takes 9 channels, .* 4: {BESIDE}"),
    ("sd", "StableDiffusionInstructPix2PixPipeline", {"unet": {"in_channels": 8}}, f"takes 8 channels, .* 4: {BESIDE}"),
    ("sd", "StableDiffusionDepth2ImgPipeline", {"unet": {"in_channels": 5}}, f"takes 5 channels, .* 4: {BESIDE}"),
    ("sd", "StableDiffusionUpscalePipeline", {"unet": {"in_channels": 7, "num_class_embeds": 1000}}, BESIDE),
    ("sdxl", "StableDiffusionXLInpaintPipeline", {"unet": {"in_channels": 9}}, f"takes 9 channels, .* 4: {BESIDE}"),
    ("sd", "StableDiffusionLDM3DPipeline", {"vae": {"in_channels": 6}}, "its autoencoder takes 6 channels"),
    ("sd", "StableDiffusionPipeline", {"vae": {"_class_name": "AsymmetricAutoencoderKL"}},
     "its vae is a AsymmetricAutoencoderKL, not a AutoencoderKL"),
    ("sd", "StableDiffusionPipeline", {"vae": {"_class_name": "AutoencoderTiny"}}, "its vae is a AutoencoderTiny"),
    ("sd", "StableDiffusionControlNetXSPipeline", {"unet": {"_class_name": "UNetControlNetXSModel"}},
     "its unet is a UNetControlNetXSModel, not a UNet2DConditionModel"),
    ("sd", "StableDiffusionPipeline", {"unet": {"class_embed_type": "projection"}}, "is told a class or a noise level"),
])  # fmt: skip
def test_a_relative_is_refused_in_a_sentence(
    folders: dict[str, str], tmp_path: Path, kind: str, pipeline: str, changes: dict[str, Any], said: str
) -> None:
    named: Any = ["pipeline", "MyFluxPipeline"] if pipeline.startswith("[") else pipeline
    with pytest.raises(ValueError, match=said):
        read_geometry(LatentModelSettings(model=relative(folders[kind], tmp_path / "model", named, **changes)))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_lacks_a_text_encoder_is_refused(folders: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Stable Diffusion's image variations; SDXL's refiner."""
    folder = relative(folders[kind], tmp_path / "model", "StableDiffusionXLImg2ImgPipeline" if kind == "sdxl" else
                      "StableDiffusionImageVariationPipeline")  # fmt: skip
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    with pytest.raises(ValueError, match="lacks its text_encoder"):
        read_geometry(LatentModelSettings(model=folder))


@pytest.mark.parametrize("pipeline", ["StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"])
def test_the_same_networks_under_another_pipeline_are_loaded_by_their_own(
    folders: dict[str, str], tmp_path: Path, pipeline: str
) -> None:
    folder = relative(folders["sd"], tmp_path / "model", pipeline)
    assert (
        "pipe = StableDiffusionPipeline.from_pretrained("
        in read_geometry(LatentModelSettings(model=folder)).usage.pipeline
    )
