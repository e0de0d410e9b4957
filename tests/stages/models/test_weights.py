"""Every form in which people have weights: what is read is what is fingerprinted, and the rest is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models import clip, kandinsky
from stages.models.decoding import Decode
from stages.models.families import open_latent_model, read_geometry
from stages.models.fingerprint import describe_model
from stages.models.settings import LatentModelSettings
from stages.models.weights import WeightsError, weights_of
from tests.support import tiny_kandinsky, tiny_stable_diffusion

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_stable_diffusion.build(tmp_path_factory.mktemp("models") / "sd"))


def pipeline(folder: Path, **options: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **options)


def settings(folder: Path, **options: Any) -> LatentModelSettings:
    return LatentModelSettings(model=str(folder), device="cpu", **options)


def prints(folder: Path, **options: Any) -> dict[str, str]:
    found = read_geometry(settings(folder, **options)).fingerprints()
    return {part: found[part]["fingerprint"] for part in found}


def loaded(folder: Path, **options: Any) -> dict[str, dict[str, torch.Tensor]]:
    pipe = open_latent_model(settings(folder, **options)).pipeline  # type: ignore[attr-defined]
    return {part: getattr(pipe, part).state_dict() for part in PARTS}


def assert_same(found: dict[str, Any], wanted: Any) -> None:
    for part in PARTS:
        state = getattr(wanted, part).state_dict()
        assert found[part].keys() == state.keys()
        assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in found[part].items()), part


def test_half_precision_files_alone_are_read_without_being_asked_for(plain: Path, tmp_path: Path) -> None:
    pipeline(plain, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert weights_of(str(tmp_path), None, "unet").files == ("diffusion_pytorch_model.fp16.safetensors",)
    assert_same(loaded(tmp_path), pipeline(tmp_path, variant="fp16"))
    assert prints(tmp_path) == prints(tmp_path, variant="fp16")
    assert not set(prints(tmp_path).values()) & set(prints(plain).values())


def test_the_fingerprint_is_of_the_variant_that_is_read(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "sd")
    file = tmp_path / "sd/unet/diffusion_pytorch_model.safetensors"
    halved = {name: value * 0.5 for name, value in load_file(file).items()}
    save_file(halved, file.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    assert prints(tmp_path / "sd") == prints(plain)
    before, after = prints(tmp_path / "sd"), prints(tmp_path / "sd", variant="fp16")
    assert {part for part in before if before[part] != after[part]} == {"unet"}
    read = loaded(tmp_path / "sd", variant="fp16")
    assert all(torch.equal(value, halved[name]) for name, value in read["unet"].items())
    state = pipeline(plain).text_encoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in read["text_encoder"].items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_and_all_of_them_counted(plain: Path, tmp_path: Path, variant: str | None) -> None:
    pipe = pipeline(plain)
    pipe.save_pretrained(tmp_path, max_shard_size="40KB", variant=variant)
    found = weights_of(str(tmp_path), None, "unet").files
    assert len(found) > 2
    assert_same(loaded(tmp_path), pipe)
    before = prints(tmp_path)
    last = tmp_path / "unet" / found[-1]
    save_file({name: value + 1 for name, value in load_file(last).items()}, last, metadata={"format": "pt"})
    after = prints(tmp_path)
    assert {part for part in before if before[part] != after[part]} == {"unet"}


def test_shards_of_an_earlier_model_are_not_its(plain: Path, tmp_path: Path) -> None:
    pipeline(plain).unet.save_pretrained(tmp_path / "few", max_shard_size="80KB")
    pipeline(plain).unet.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    before = describe_model(str(tmp_path / "few"))["fingerprint"]
    for file in (tmp_path / "many").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "few")
    assert describe_model(str(tmp_path / "few"))["fingerprint"] == before


def test_pickles_are_refused_with_the_command_that_converts_them(plain: Path, tmp_path: Path) -> None:
    pipe = pipeline(plain)
    shutil.copytree(plain, tmp_path / "sd")
    for part in PARTS:
        for file in (tmp_path / "sd" / part).glob("*.safetensors"):
            file.unlink()
    pipe.unet.save_pretrained(tmp_path / "sd/unet", safe_serialization=False, max_shard_size="60KB")
    pipe.vae.save_pretrained(tmp_path / "sd/vae", safe_serialization=False)
    torch.save(pipe.text_encoder.state_dict(), tmp_path / "sd/text_encoder/pytorch_model.bin")
    assert_same(loaded(tmp_path / "sd", allow_pickle=True), pipe)
    assert len(set(prints(tmp_path / "sd", allow_pickle=True).values())) == 3
    for part in PARTS:  # one after another, as a user would
        with pytest.raises(WeightsError, match="pickles alone") as caught:
            prints(tmp_path / "sd")
        assert f"sd/{part} holds" in str(caught.value)
        (command,) = [line for line in str(caught.value).splitlines() if line.startswith("  python -c")]
        python, *arguments = shlex.split(command)
        assert python == "python"
        subprocess.run([sys.executable, *arguments], check=True)
    assert_same(loaded(tmp_path / "sd"), pipe)


def test_several_variants_without_plain_files_have_to_be_chosen_from(plain: Path, tmp_path: Path) -> None:
    for variant in ("fp16", "ema"):
        pipeline(plain).save_pretrained(tmp_path, variant=variant)
    with pytest.raises(WeightsError, match="say which with `variant`: ema, fp16"):
        prints(tmp_path)
    assert_same(loaded(tmp_path, variant="ema"), pipeline(plain))
    (tmp_path / "vae").joinpath("diffusion_pytorch_model.ema.safetensors").unlink()
    (tmp_path / "vae").joinpath("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*vae"):
        prints(tmp_path, variant="ema")


def test_parts_that_inversion_does_not_need_may_be_missing_or_null(plain: Path, tmp_path: Path) -> None:
    wanted = loaded(plain)
    shutil.copytree(plain, tmp_path / "sd")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    needless = {"feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True}
    needless |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "image_encoder": [None, None]}
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index | needless))
    found = loaded(tmp_path / "sd")
    assert all(torch.equal(found[part][name], value) for part in PARTS for name, value in wanted[part].items())
    assert prints(tmp_path / "sd") == prints(plain)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_needed_is_named_when_it_is_missing(plain: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(plain, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / part)
    with pytest.raises(ValueError, match=f"lacks its (text_encoder|{part}), or it cannot be read"):
        prints(tmp_path / "sd")


# --- encoders, priors and decoders


def test_encoders_and_decoders_are_read_in_every_form_too(tmp_path: Path) -> None:
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    prior = tiny_kandinsky.build_prior(tmp_path / "prior")
    KandinskyV22PriorPipeline.from_pretrained(prior, dtype=torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    whole, half = clip.TextEncoder(prior), clip.TextEncoder(str(tmp_path / "half"))
    for name, value in half.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name].half().to(value.dtype)), name
    assert clip.identity(str(tmp_path / "half"), "image") != clip.identity(prior, "image")
    clip.ImageEncoder(str(tmp_path / "half"))
    decoder = tiny_kandinsky.build_decoder(tmp_path / "decoder")
    KandinskyV22Pipeline.from_pretrained(decoder).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    found = kandinsky.identity(Decode(model=str(tmp_path / "shards")))
    assert len(weights_of(str(tmp_path / "shards"), None, "movq").files) > 1
    assert found["decoder_unet"] != kandinsky.identity(Decode(model=decoder))["decoder_unet"]
    drawn = [
        kandinsky.Decoder(Decode(model=model, steps=2), torch.zeros(tiny_kandinsky.WIDTH)).pictures(
            torch.ones(1, tiny_kandinsky.WIDTH), ["a"]
        )[0]
        for model in (decoder, str(tmp_path / "shards"))
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()


def test_pickles_of_an_encoder_are_refused_and_can_be_allowed(tmp_path: Path) -> None:
    prior = Path(tiny_kandinsky.build_prior(tmp_path / "prior"))
    state = load_file(prior / "image_encoder/model.safetensors")
    (prior / "image_encoder/model.safetensors").unlink()
    torch.save(state, prior / "image_encoder/pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickles alone"):
        clip.identity(str(prior), "image")
    with pytest.raises(WeightsError, match="pickles alone"):
        clip.ImageEncoder(str(prior))
    assert clip.identity(str(prior), "image", allow_pickle=True)["fingerprint"]
    encoder = clip.ImageEncoder(str(prior), allow_pickle=True)
    assert all(torch.equal(value, state[name]) for name, value in encoder.model.state_dict().items())
