"""Families of rectified flows against diffusers' own pipelines: sigmas to the last bit, pictures, errors."""

from __future__ import annotations

import copy
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.models.captions import cuts
from stages.models.families import open_latent_model, read_geometry
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.models.settings import LatentModelSettings, SamplingSettings
from tests.support import tiny_flows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: tiny_flows.build(tmp_path_factory.mktemp(kind), kind) for kind in tiny_flows.KINDS}


@lru_cache
def opened(folder: str, dtype: str = "float32", scheduler: str | None = None) -> LatentModel:
    changes = None if scheduler is None else json.loads(scheduler)
    return open_latent_model(LatentModelSettings(model=folder, device="cpu", dtype=dtype, scheduler=changes))


@lru_cache
def stock(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline as anybody loads it."""
    from diffusers import DiffusionPipeline

    without_t5 = "sd3" in folder and not (Path(folder) / "text_encoder_3").is_dir()
    without = {"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PACKED = ("flux-dev", "flux-schnell", "chroma", "qwen-image", "ovis-image")
UNIT = {"qwen-image": 4, "qwen-image-21": 8, "z-image": 2}
"""Of the sizes here: Qwen-Image's autoencoders have 8 and 16 pixels a latent; Z-Image's positions are 2 apart."""


def told_scale(guidance: float) -> dict[str, Any]:
    return {"guidance_scale": guidance}


GUIDED: dict[str, Any] = {
    "qwen-image": lambda g: {"true_cfg_scale": g, "negative_prompt": ""} if g > 1 else {"true_cfg_scale": 1.0},
    "z-image": lambda g: {"guidance_scale": g - 1},
}
GUIDED["qwen-image-21"] = GUIDED["qwen-image-21-turbo"] = GUIDED["qwen-image"]
"""How a pipeline is told of guidance, by its own documentation."""
UNGUIDED = ("flux-schnell", "flux2-klein", "qwen-image-21-turbo")


def given(kind: str, noise_BCHW: torch.Tensor) -> torch.Tensor:
    """The pipeline's `latents`, packed by a plain loop where it takes them packed."""
    if kind.startswith("qwen-image-21"):
        return noise_BCHW.flatten(2).transpose(1, 2)
    if kind not in PACKED:
        return noise_BCHW
    B, C, H, W = noise_BCHW.shape
    tokens = [noise_BCHW[:, :, y : y + 2, x : x + 2].reshape(B, 4 * C) for y in range(0, H, 2) for x in range(0, W, 2)]
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev", "flux-schnell", "chroma", "flux2-dev", "flux2-klein", "qwen-image",
                                  "qwen-image-21", "z-image", "ovis-image"])  # fmt: skip
@pytest.mark.parametrize("size", [(16, 16), (24, 8), (20, 16)], ids=str)
def test_sigmas_and_times_are_the_pipeline_s_to_the_last_bit(folders, kind: str, size: tuple[int, int]) -> None:
    size = tuple(side * UNIT.get(kind, 1) for side in size)
    pipe, model = stock(folders[kind]), opened(folders[kind]).at(*size)
    seen: dict[str, Any] = {}

    def note(pipe: Any, i: int, t: torch.Tensor, tensors: Any) -> dict[str, Any]:
        seen.update(t=pipe.scheduler.timesteps.clone(), sigma=pipe.scheduler.sigmas.clone())
        pipe._interrupt = True
        return {}

    for steps in (2 if kind.startswith("qwen-image") else 1, 4, 7, 28):
        pipe(prompt="red star", width=size[0], height=size[1], num_inference_steps=steps, output_type="latent",
             callback_on_step_end=note, **GUIDED.get(kind, told_scale)(1.0))  # fmt: skip
        schedule = model.schedule(steps)
        assert torch.equal(schedule.t_S.flip(0), seen["t"])
        assert torch.equal(schedule.sigma_S.float().flip(0), seen["sigma"][:-1])
        assert torch.equal(schedule.sigma_prev_S.float().flip(0), seen["sigma"][1:])
        assert torch.equal(schedule.at(torch.arange(steps)).weight.flatten(), seen["sigma"].diff().flip(0))
        assert torch.equal(schedule.t_prev_S, torch.cat([torch.zeros(1), schedule.t_S[:-1]]))


@pytest.mark.parametrize("change", [{"shift_terminal": 0.02}, {"use_dynamic_shifting": True, "shift_terminal": 0.1},
                                    {"use_karras_sigmas": True}, {"time_shift_type": "linear",
                                                                  "use_dynamic_shifting": True}], ids=str)  # fmt: skip
def test_a_changed_scheduler_is_the_pipeline_s_too(folders, change: dict[str, Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for kind in ("sd3", "flux-dev"):
        pipe, model = copy.copy(stock(folders[kind])), opened(folders[kind], scheduler=json.dumps(change))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **change)
        pipe("red", width=16, height=16, num_inference_steps=5, output_type="latent", guidance_scale=1.0)
        assert torch.equal(model.schedule(5).sigma_S.float().flip(0), pipe.scheduler.sigmas[:-1])


@pytest.mark.parametrize("kind", list(tiny_flows.KINDS))
def test_what_is_drawn_of_a_seed_is_what_the_pipeline_draws(folders, kind: str) -> None:
    """Conditions, time, packing, shift and scale, guidance, decoding: all of it, at a size that is no square."""
    width, height = (side * UNIT.get(kind.removesuffix("-turbo"), 1) for side in (24, 16))
    pipe, model = stock(folders[kind]), opened(folders[kind]).at(width, height)
    noise = torch.randn(2, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(5))
    prompts = ["red star", "a dotted circle that is small"]
    for guidance in (1.0, 3.5) if kind not in UNGUIDED else (1.0,):
        condition = model.condition(prompts, guided=guidance > 1)
        z = sample(model.predictor(guidance), model.schedule(4), noise, condition)
        x = (model.decode(z) / 2 + 0.5).clamp(0, 1)
        # Where a picture's positions depend on the longest text beside it, a row is drawn as a pipeline draws it alone.
        calls = [slice(0, 1), slice(1, 2)] if kind.startswith("qwen-image-21") else [slice(None)]
        wanted = np.concatenate([
            pipe(prompt=prompts[rows], width=width, height=height, num_inference_steps=4, output_type="np",
                 latents=given(kind, noise[rows]), **GUIDED.get(kind, told_scale)(guidance)).images
            for rows in calls
        ])  # fmt: skip
        if wanted.shape[-1] == 4:  # over white
            wanted = wanted[..., :3] * wanted[..., 3:] + (1 - wanted[..., 3:])
        np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_pictures_are_encoded_as_the_pipelines_encode_them(folders, kind: str) -> None:
    import diffusers

    pipe, model = stock(folders[kind]), opened(folders[kind])
    assert model.dtypes["vae"] == torch.float32
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    config = pipe.vae.config
    wanted = (pipe.vae.encode(x).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(model.encode(x), wanted)
    again = diffusers.AutoencoderKL.from_pretrained(f"{folders[kind]}/vae")
    torch.testing.assert_close(model.decode(wanted), again.decode(wanted / 1.5 + 0.06).sample)


def test_pictures_are_encoded_as_flux2_encodes_those_it_is_shown(folders) -> None:
    pipe, model = stock(folders["flux2-klein"]), opened(folders["flux2-klein"])
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(model.encode(x), pipe._encode_vae_image(x, None))
    mean, std = model.posterior(x)
    found = pipe.vae.encode(x).latent_dist
    one_off = pipe._patchify_latents(found.mean + found.std) - pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    torch.testing.assert_close(mean + std, one_off / (pipe.vae.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1))
    assert mean.shape == std.shape == (2, 16, 4, 6)
    torch.testing.assert_close(model.decode(mean), pipe.vae.decode(found.mean).sample)


def test_rows_stand_at_different_times_in_one_call(folders) -> None:
    for kind in ("sd3", "flux-dev", "chroma", "qwen-image-21"):
        model = opened(folders[kind])
        model = model.at(64, 32) if kind == "qwen-image-21" else model
        z = torch.randn(3, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(2))
        t, told = torch.tensor([1000.0, 500.0, 12.5]), model.condition(["red", "blue star", ""])
        together = model.predictor()(z, t, told)
        for i in range(3):
            alone = model.predictor()(z[i : i + 1], t[i : i + 1], {name: one[i : i + 1] for name, one in told.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["flux-dev", "chroma", "qwen-image-21", "ovis-image"])
def test_networks_load_in_half_precision_and_the_autoencoder_does_not(folders, kind: str) -> None:
    model, guidance = opened(folders[kind], dtype="bfloat16").at(64, 32), 2.0 if kind == "flux-dev" else 1.0
    types = dict(model.dtypes)
    assert types.pop("vae") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    pipe = stock(folders[kind], torch.bfloat16)
    z = torch.randn(1, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(3))
    seen: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda net, args, out: seen.append(out[0]))
    pipe(prompt="red star", width=64, height=32, num_inference_steps=3, output_type="latent", latents=given(kind, z),
         **GUIDED.get(kind, told_scale)(guidance))  # fmt: skip
    v = model.predictor(guidance)(z, model.schedule(3).t_S[-1:], model.condition(["red star"]))
    assert v.dtype == torch.float32
    wanted = given(kind, v).bfloat16()
    torch.testing.assert_close(wanted, seen[0][:, -wanted.shape[1] :])


def test_texts_of_unequal_length_stand_alone_as_they_stand_together(folders) -> None:
    """What is padded and masked has no part in the velocity; on the meta device texts are taken as long as can be."""
    for kind in ("qwen-image", "qwen-image-21", "z-image"):
        model = opened(folders[kind]).at(32, 32)
        assert model.activation_bytes("predict") > 0
        told = model.condition(["red", "a blue star that is melted in ice"])
        lengths = told["mask_BL"].sum(1).tolist()
        assert lengths[0] < lengths[1] < 512
        z = torch.randn(1, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(2))
        one = {name: value[:1] for name, value in told.items()}
        other = {**one, "text_BLE": torch.where(one["mask_BL"][..., None], one["text_BLE"], 7.0)}
        t = torch.tensor([600.0])
        torch.testing.assert_close(model.predictor()(z, t, other), model.predictor()(z, t, one))


def test_a_long_prompt_says_what_was_left_out_of_it(folders) -> None:
    long = " ".join(["red"] * 600)
    wanted = {
        "flux-dev": "text_encoder reads 16 of 602 tokens; text_encoder_2 reads 512 of 601 tokens",
        "sd3": "text_encoder reads 16 of 602 tokens; text_encoder_2 reads 16 of 602 tokens; "
        "text_encoder_3 reads 256 of 601 tokens",
    }
    for kind, said in wanted.items():
        assert cuts(["red star", long], opened(folders[kind]).readers) == [{"prompt_cut": None}, {"prompt_cut": said}]
    for kind in ("qwen-image", "qwen-image-21", "z-image"):
        model = opened(folders[kind])
        (reader,) = model.readers
        for prompt in ("red", "red star", "a" * 400):
            told = model.condition([prompt])
            assert min(len(reader.tokenizer(prompt)["input_ids"]), 512) == int(told["mask_BL"].sum()), (kind, prompt)
        (one,) = cuts([long], (reader,))
        assert (one["prompt_cut"] or "").startswith("text_encoder reads 512 of ")


SHORT = {
    "sd3": 7, "flux-dev": 5, "chroma": 5, "flux2-dev": 8, "flux2-klein": 5, "qwen-image": 6, "z-image": 20,
    "ovis-image": 140,
}  # fmt: skip
"""Tokens that a prompt does not fit into; Ovis-Image's instruction is among them."""


@pytest.mark.parametrize("kind", list(SHORT))
def test_the_language_model_reads_as_many_tokens_as_it_is_told_to(folders, kind: str) -> None:
    """Against the pipeline with the same `max_sequence_length`; the prompt is longer."""
    tokens, prompt = SHORT[kind], "a dotted red star that is small and stands on a blue circle"
    model = open_latent_model(LatentModelSettings(model=folders[kind], device="cpu", max_sequence_length=tokens))
    side = 8 * UNIT.get(kind, 1) * 2
    model = model.at(side, side)
    noise = torch.randn(1, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(5))
    z = sample(model.predictor(), model.schedule(2), noise, model.condition([prompt]))
    drawn = {
        many: stock(folders[kind])(
            prompt=prompt, width=side, height=side, num_inference_steps=2, output_type="np", latents=given(kind, noise),
            max_sequence_length=many, **GUIDED.get(kind, told_scale)(1.0),
        ).images
        for many in (tokens, tokens + 2)
    }  # fmt: skip
    x = (model.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(x, drawn[tokens], atol=2e-5)
    assert np.abs(drawn[tokens] - drawn[tokens + 2]).max() > 1e-3, "what is cut off says nothing"
    assert f"reads {tokens} of " in str(cuts([prompt], model.readers)[0]["prompt_cut"])
    assert model.geometry.usage.more == f"max_sequence_length={tokens}, "
    assert model.geometry.text_shape[0] == (77 if kind == "sd3" else 0) + tokens


def test_qwen_image_21_reads_the_beginning_of_a_prompt_as_its_pipeline_reads_the_whole(folders) -> None:
    """The pipeline cuts nothing: the card hands it the first tokens of what its causal language model makes of all."""
    prompt = "a dotted red star that is small and stands on a blue circle"
    model = open_latent_model(LatentModelSettings(model=folders["qwen-image-21"], device="cpu", max_sequence_length=9))
    model, pipe = model.at(32, 32), stock(folders["qwen-image-21"])
    told = model.condition(["red", prompt])
    assert told["text_BLE"].shape[1] == 9
    noise = torch.randn(1, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(5))
    drawn = {}
    for tokens in (9, 11):
        text_BLE = eval(model.geometry.usage.prompt.replace(":9]", f":{tokens}]").partition("=")[2],
                        {"pipe": pipe, "row": {"prompt": prompt}})  # fmt: skip
        assert text_BLE.shape[1] == tokens
        drawn[tokens] = pipe(prompt_embeds=text_BLE, width=32, height=32, num_inference_steps=2, output_type="latent",
                             latents=given("qwen-image-21", noise)).images  # fmt: skip
    z = sample(model.predictor(), model.schedule(2), noise, {name: value[1:] for name, value in told.items()})
    torch.testing.assert_close(given("qwen-image-21", z), drawn[9], rtol=1e-4, atol=2e-5)
    assert (drawn[9] - drawn[11]).abs().max() > 1e-3, "what is cut off says nothing"
    assert str(cuts([prompt], model.readers)[0]["prompt_cut"]).startswith("text_encoder reads 9 of ")
    with pytest.raises(ValueError, match=r"negative: \d+ tokens, and model .* is given 9: write a shorter one"):
        model.condition(["red"], guided=True, negative=prompt)


@torch.no_grad()
def test_a_picture_is_opaque_to_qwen_image_21_and_what_it_draws_lies_on_white(folders) -> None:
    from PIL import Image

    pipe, model = stock(folders["qwen-image-21"]), opened(folders["qwen-image-21"]).at(64, 32)
    opaque = Image.effect_noise((64, 32), 90).convert("RGBA")
    shown = pipe.image_processor.preprocess(opaque)
    z = model.encode(shown[:, :3])
    torch.testing.assert_close(z, pipe._encode_vae_image(shown.unsqueeze(2), None)[:, :, 0])
    torch.testing.assert_close(model.posterior(shown[:, :3])[0], z)
    config = pipe.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    rgba = (pipe.vae.decode(z[:, :, None] * std + mean).sample[0, :, 0] / 2 + 0.5).permute(1, 2, 0).numpy()
    wanted = [[seen[:3] * seen[3] + 1 - seen[3] for seen in line] for line in rgba]
    np.testing.assert_allclose((model.decode(z)[0] / 2 + 0.5).permute(1, 2, 0), wanted, atol=1e-5)
    assert rgba[..., 3].min() < 0.9, "nothing shines through"


def test_a_list_of_sigmas_says_how_many_steps_there_are(folders) -> None:
    geometry = read_geometry(LatentModelSettings(model=folders["qwen-image-21-turbo"]))
    assert geometry.schedule(4).sigma_S.tolist() == pytest.approx([0.4, 0.8, 0.97, 1.0])
    with pytest.raises(ValueError, match=r"steps is 20: .*`sample_sigmas`.* draws in 4 steps .*; set steps: 4"):
        geometry.schedule(20)


@pytest.mark.parametrize(("kind", "part", "reads"), [("flux2-dev", "tokenizer", "PixtralProcessor"),
                                                     ("qwen-image-21", "processor", "Qwen3VLProcessor")])  # fmt: skip
def test_a_processor_of_pictures_asks_for_torchvision(
    folders, tmp_path, monkeypatch, kind: str, part: str, reads: str
) -> None:
    monkeypatch.setattr("stages.models.transformer.find_spec", lambda name: None)
    index = edited(folders[kind], tmp_path / "m", "model_index.json", **{part: ["transformers", reads]})
    with pytest.raises(ValueError, match=rf"reads prompts by a {reads}: pip install torchvision"):
        open_latent_model(LatentModelSettings(model=index, device="cpu"))


def test_a_tokenizer_made_for_short_captions_is_given_no_more(folders, tmp_path) -> None:
    folder = edited(folders["flux-dev"], tmp_path / "short", "tokenizer_2/tokenizer_config.json", model_max_length=32)
    assert read_geometry(LatentModelSettings(model=folder)).text_tokens == 32
    assert read_geometry(LatentModelSettings(model=folder, max_sequence_length=48)).text_tokens == 48
    assert read_geometry(LatentModelSettings(model=folders["flux-dev"])).usage.more == ""


def test_text_encoders_wait_elsewhere_and_come_for_the_captions(folders, monkeypatch) -> None:
    seen: list[tuple[str, str]] = []
    plain = torch.nn.Module.to

    def to(network: torch.nn.Module, where: Any = None, *args: Any, **options: Any) -> torch.nn.Module:
        if isinstance(where, (str, torch.device)):
            seen.append((type(network).__name__, str(where)))
        return plain(network, where, *args, **options)

    model = open_latent_model(SamplingSettings(model=folders["flux-dev"], device="cpu", offload="text-encoders"))
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(type(model), "reads_on", property(lambda model: torch.device("cpu:0")))
    told = model.condition(["red star"])
    assert seen == [("CLIPTextModel", "cpu:0"), ("T5EncoderModel", "cpu:0"), ("CLIPTextModel", "cpu"),
                    ("T5EncoderModel", "cpu")]  # fmt: skip
    wanted = opened(folders["flux-dev"]).condition(["red star"])
    assert all(torch.equal(told[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"offload: the text encoders .* are small"):
        read_geometry(SamplingSettings(offload="text-encoders"))


def edited(folder: str, target: Path, file: str, **changes: Any) -> str:
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(config | changes))
    return str(target)


def test_bad_models_are_refused_in_a_sentence(folders, tmp_path) -> None:
    def refused(said: str, folder: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=said):
            read_geometry(LatentModelSettings(model=folder, device="cpu", **options))

    sd3, flux = folders["sd3"], folders["flux-dev"]
    index = "model_index.json"
    refused("is a Lumina2Pipeline; inversion knows .*StableDiffusion3Pipeline, FluxPipeline",
            edited(sd3, tmp_path / "a", index, _class_name="Lumina2Pipeline"))  # fmt: skip
    refused("is a FluxFillPipeline; inversion knows",
            edited(flux, tmp_path / "b", index, _class_name="FluxFillPipeline"))  # fmt: skip
    missing = edited(flux, tmp_path / "c", index, tokenizer_2=[None, None])
    refused("lacks its tokenizer_2, which a FluxPipeline consists of", missing)
    shutil.rmtree(Path(edited(sd3, tmp_path / "d", index)) / "transformer")
    refused("lacks its transformer", str(tmp_path / "d"))
    refused("its transformer is a SD3Transformer2DModel, not a FluxTransformer2DModel",
            edited(sd3, tmp_path / "e", index, _class_name="FluxPipeline"))  # fmt: skip
    refused("whose rectified flow a DDIMScheduler does not run .* scheduler: {class: FlowMatchEuler",
            edited(flux, tmp_path / "f", "scheduler/scheduler_config.json", _class_name="DDIMScheduler",
                   beta_start=0.001, beta_end=0.01, beta_schedule="linear"))  # fmt: skip
    refused("stochastic_sampling .* fresh noise", flux, scheduler={"stochastic_sampling": True})
    refused("has no parameter 'shft'", flux, scheduler={"shft": 2.0})
    refused("takes 32 channels, its autoencoder gives 16",
            edited(flux, tmp_path / "g", "transformer/config.json", in_channels=128))  # fmt: skip
    refused("size 18 is no multiple of 4", flux, size=18)
    refused("size 64 is more than the 48 pixels", sd3, size=64)
    refused("lacks its text_encoder_2", edited(flux, tmp_path / "h", index, text_encoder_2=[None, None]))
    with pytest.raises(ValueError, match=r"shift_terminal is 1.0: it is from 0 to below 1"):
        read_geometry(LatentModelSettings(model=flux, scheduler={"shift_terminal": 1.0})).schedule(4)
    with pytest.raises(ValueError, match=r"steps is 1: with its shift_terminal .* needs 2"):
        read_geometry(LatentModelSettings(model=folders["qwen-image"])).schedule(1)
    refused("max_sequence_length is 513: the FluxPipeline of model .* takes up to 512", flux, max_sequence_length=513)
    with pytest.raises(ValueError, match=r"max_sequence_length: CLIP reads for model .* always 77 tokens"):
        read_geometry(LatentModelSettings(max_sequence_length=32))
    refused("size 16384 is more than the 2048 pixels", folders["z-image"], size=16384)
    refused("vae: model .* has an AutoencoderKLQwenImage", folders["qwen-image"], vae=folders["sd3"])
    with pytest.raises(ValueError, match=r"guidance: model .* has none"):
        opened(folders["flux-schnell"]).predictor(3.0)
    with pytest.raises(ValueError, match="no negative prompt"):
        opened(flux).condition(["red"], negative="blue")


def test_what_is_made_for_noise_prediction_says_so(folders) -> None:
    from stages.concepts.settings import LearnConceptsSettings
    from stages.concepts.stage import LearnConcepts
    from stages.inverter.settings import DrawPairsSettings
    from stages.inverter.stage import DrawPairs

    with pytest.raises(ValueError, match="is a rectified flow, and words are learned by the noise-prediction loss"):
        LearnConcepts.describe(LearnConceptsSettings(model=folders["sd3"]))
    with pytest.raises(ValueError, match="is a rectified flow, and text latents"):
        DrawPairs.describe(DrawPairsSettings(model=folders["flux-dev"]))
