"""The U-Net family: it is a `LatentModel`, each part runs in its type, and scheduler and autoencoder can be others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.models.families import open_latent_model, read_geometry
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.models.schedule import ddim_schedule
from stages.models.settings import LatentModelSettings, SamplingSettings
from tests.support import tiny_stable_diffusion
from tests.support.card_lines import check_card_lines


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        kind: tiny_stable_diffusion.build(tmp_path_factory.mktemp(kind) / kind, kind) for kind in ("sd", "sdxl")
    }  # fmt: skip


def pictures() -> torch.Tensor:
    return torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1


def rescaled(folder: str, target: Path, **config: object) -> str:
    """The folder's autoencoder by itself, its configuration changed."""
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(folder, subfolder="vae").save_pretrained(target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(target)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_it_is_a_latent_model(folders: dict[str, str], kind: str) -> None:
    settings = LatentModelSettings(model=folders[kind], device="cpu")
    model, geometry = open_latent_model(settings), read_geometry(settings)
    assert isinstance(model, LatentModel)
    assert model.geometry == geometry
    z_BCHW = model.encode(pictures())
    assert tuple(z_BCHW.shape) == (2, *geometry.latent_shape)
    assert tuple(model.decode(z_BCHW).shape) == (2, 3, geometry.height, geometry.width)
    condition = model.condition(["red star", ""], guided=True, negative="blue")
    assert tuple(condition["text_BLE"].shape) == (2, *geometry.text_shape)
    assert {len(value) for value in condition.values()} == {2}
    t_B = torch.tensor([3, 900])
    guided = model.predictor(2.0)(z_BCHW, t_B, condition)
    null, text = (
        model.predictor()(z_BCHW, t_B, {k.removeprefix("null_"): v for k, v in own.items()})
        for own in (
            {k: v for k, v in condition.items() if k.startswith("null_") or f"null_{k}" not in condition},
            {k: v for k, v in condition.items() if not k.startswith("null_")},
        )
    )
    torch.testing.assert_close(guided, null + 2 * (text - null), rtol=1e-4, atol=1e-4)
    again = model.text_condition(condition["text_BLE"], condition.get("pooled_BE"))
    assert {name: value.tolist() for name, value in again.items()} == {
        name: value.tolist() for name, value in condition.items() if not name.startswith("null_")
    }
    assert geometry.word_widths == tuple(encoder.width for encoder in model.text_encoders)
    assert set(geometry.fingerprints()) == set(geometry.parts)


def test_what_is_drawn_is_the_pipelines(folders: dict[str, str]) -> None:
    from diffusers import StableDiffusionXLPipeline

    model = open_latent_model(LatentModelSettings(model=folders["sdxl"], device="cpu"))
    pipe = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])
    prompts = ["red star", "a ring"]
    drawn = model.draw(
        model.condition(prompts, guided=True), steps=3, guidance=4.0,
        generators=[torch.Generator().manual_seed(n) for n in (1, 2)],
    )  # fmt: skip
    wanted = pipe(
        prompts, num_inference_steps=3, guidance_scale=4.0, height=16, width=16, output_type="latent",
        generator=[torch.Generator().manual_seed(n) for n in (1, 2)],
    ).images  # fmt: skip
    assert torch.equal(drawn, wanted)


def test_sdxl_without_a_pooled_latent_is_refused(folders: dict[str, str]) -> None:
    model = open_latent_model(LatentModelSettings(model=folders["sdxl"], device="cpu"))
    with pytest.raises(ValueError, match="needs a pooled text embedding"):
        model.text_condition(torch.zeros(1, 16, 56))


# --- types


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parts_are_read_in_the_type_they_run_in(folders: dict[str, str], dtype: str) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    whole = open_latent_model(LatentModelSettings(model=folders["sdxl"], device="cpu"))
    half = open_latent_model(LatentModelSettings(model=folders["sdxl"], device="cpu", dtype=dtype))
    vae = torch.float32 if dtype == "float16" else kind  # this autoencoder says force_upcast
    assert half.dtypes == {"unet": kind, "vae": vae, "text_encoder": kind, "text_encoder_2": kind}
    for part in whole.geometry.parts:
        wanted, found = (getattr(model.pipeline, part).state_dict() for model in (whole, half))
        for name, value in wanted.items():
            assert torch.equal(found[name], value.to(found[name].dtype)), (part, name)
    z_BCHW = half.encode(pictures())
    m_BCHW = half.predictor(3.0)(z_BCHW, torch.tensor([1, 500]), half.condition(["red", "star"], guided=True))
    assert z_BCHW.dtype == m_BCHW.dtype == half.decode(z_BCHW).dtype == torch.float32


def test_an_autoencoder_that_runs_in_float32_is_not_read_from_the_rounded_variant(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = tiny_stable_diffusion.build(tmp_path / "sd")
    full = open_latent_model(LatentModelSettings(model=folder, device="cpu"))
    rounded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float16)
    rounded.save_pretrained(folder, variant="fp16")
    settings = LatentModelSettings(model=folder, device="cpu", variant="fp16", dtype="float16")
    x_BCHW = pictures()
    assert torch.equal(open_latent_model(settings).encode(x_BCHW), full.encode(x_BCHW))
    (tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    only = open_latent_model(settings)
    assert only.dtypes["vae"] == torch.float32
    assert not torch.equal(only.encode(x_BCHW), full.encode(x_BCHW))


def test_no_deprecated_argument_is_used(folders: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_latent_model(LatentModelSettings(model=folders["sd"], device="cpu", dtype="float16"))
    said = [str(warning.message) for warning in caught] + [capfd.readouterr().err]
    assert not [line for line in said if "dtype" in line]


# --- another scheduler


def test_the_schedule_is_the_changed_ones(folders: dict[str, str]) -> None:
    changes = {"class": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    settings = LatentModelSettings(model=folders["sd"], device="cpu", scheduler=changes)
    model, plain = open_latent_model(settings), read_geometry(LatentModelSettings(model=folders["sd"]))
    assert model.geometry.scheduler == {
        **plain.scheduler, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"
    }  # fmt: skip
    wanted = ddim_schedule({**plain.scheduler, "timestep_spacing": "trailing"}, 4)
    assert model.schedule(4).t_S.tolist() == wanted.t_S.tolist() == [249, 499, 749, 999]
    assert torch.equal(model.schedule(4).weight_S, wanted.weight_S)
    assert type(model.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert model.pipeline.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": "EDMEulerScheduler"}, "'EDMEulerScheduler' is none of the schedulers known here"),
        ({"class": "AutoencoderKL"}, "'AutoencoderKL' is none of"),
        ({"timestep_spacings": "trailing"}, "DDIMScheduler has no parameter 'timestep_spacings'"),
        ({"class": "DDIMScheduler", "use_karras_sigmas": True}, "no parameter 'use_karras_sigmas'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is none of linear"),
        ({"beta_end": None}, "has no beta_end"),
        ({"class": "FlowMatchEulerDiscreteScheduler"}, "has a U-Net, which a FlowMatchEulerDiscreteScheduler"),
    ],
)  # fmt: skip
def test_bad_schedulers_are_refused_in_a_sentence(
    folders: dict[str, str], changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read_geometry(LatentModelSettings(model=folders["sd"], scheduler=changes))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, "noise levels are not understood"),
        ({"_class_name": "DDIMScheduler", "beta_start": 1e-4}, "has no beta_end"),
    ],
)
def test_a_model_with_other_noise_levels_is_refused(tmp_path: Path, config: dict[str, object], said: str) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        read_geometry(LatentModelSettings(model=folder))


def test_a_scheduler_s_class_can_be_put_right(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "SomeOtherScheduler"}))
    with pytest.raises(ValueError, match="SomeOtherScheduler, whose noise levels"):
        read_geometry(LatentModelSettings(model=folder))
    settings = LatentModelSettings(model=folder, device="cpu", scheduler={"class": "PNDMScheduler"})
    assert len(open_latent_model(settings).schedule(5)) == 5


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("said", [{"steps_offset": 0}, {}], ids=["offset 0", "no offset"])
@pytest.mark.parametrize("changes", [None, {"steps_offset": 0}], ids=["as it is", "changed"])
def test_times_are_those_of_the_lines_of_the_card(
    tmp_path: Path, kind: str, said: dict[str, object], changes: dict[str, object] | None
) -> None:
    """Pipelines of Stable Diffusion 1 and 2 put `steps_offset: 0` to 1, those of XL do not."""
    folder = tiny_stable_diffusion.build(tmp_path, kind)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["steps_offset"]
    file.write_text(json.dumps(config | said))
    model = open_latent_model(LatentModelSettings(model=folder, device="cpu", scheduler=changes))
    known: dict[str, Any] = {}
    names, load = model.geometry.usage.regenerating()
    exec(f"import torch\nfrom diffusers import {', '.join(names)}\n{load}", known)
    sampler = known["pipe"].scheduler
    sampler.set_timesteps(4)
    assert model.schedule(4).t_S.tolist() == sampler.timesteps.tolist()[::-1]


# --- another autoencoder


@pytest.mark.parametrize("place", ["alone", "in a pipeline"])
def test_another_autoencoder_takes_the_models_place(folders: dict[str, str], tmp_path: Path, place: str) -> None:
    other = tiny_stable_diffusion.build(tmp_path / "other", seed=1)
    vae = rescaled(other, tmp_path / "vae") if place == "alone" else other
    plain = open_latent_model(LatentModelSettings(model=folders["sd"], device="cpu"))
    model = open_latent_model(LatentModelSettings(model=folders["sd"], device="cpu", vae=vae))
    own = open_latent_model(LatentModelSettings(model=other, device="cpu"))
    x_BCHW, t_B = pictures(), torch.tensor([5, 700])
    assert torch.equal(model.encode(x_BCHW), own.encode(x_BCHW))
    assert not torch.equal(model.encode(x_BCHW), plain.encode(x_BCHW))
    z_BCHW, condition = plain.encode(x_BCHW), plain.condition(["red", "star"])
    assert torch.equal(model.predictor()(z_BCHW, t_B, condition), plain.predictor()(z_BCHW, t_B, condition))
    found, before = model.geometry.fingerprints(), plain.geometry.fingerprints()
    assert found["vae"]["fingerprint"] == own.geometry.fingerprints()["vae"]["fingerprint"]
    assert {part for part in before if found[part] != before[part]} == {"vae"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"scaling_factor": 0.13025}, "its scaling_factor is 0.13025, the model's is 0.18215"),
        ({"latent_channels": 16}, "its latent_channels is 16, the model's is 4"),
        ({"block_out_channels": [8, 8, 8]}, "scales pictures down by another factor"),
        ({"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny"),
    ],
)
def test_an_autoencoder_of_another_latent_space_is_refused(
    folders: dict[str, str], tmp_path: Path, config: dict[str, object], said: str
) -> None:
    vae = rescaled(folders["sd"], tmp_path / "vae", **config)
    with pytest.raises(ValueError, match=said):
        read_geometry(LatentModelSettings(model=folders["sd"], vae=vae))
    with pytest.raises(ValueError, match="no folder or hub id of an autoencoder"):
        read_geometry(LatentModelSettings(model=folders["sd"], vae=str(tmp_path / "nowhere")))


# --- cards


def test_a_card_names_the_revision(folders: dict[str, str]) -> None:
    plain = read_geometry(LatentModelSettings(model=folders["sd"])).usage.pipeline
    pinned = read_geometry(LatentModelSettings(model=folders["sd"], revision="v2")).usage.pipeline
    assert pinned == plain.replace(", dtype", ', revision="v2", dtype')


def test_a_card_switches_off_what_the_schedule_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    plain = read_geometry(LatentModelSettings(model=folder)).usage.sampler
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"thresholding": True, "clip_sample": True}))
    usage = read_geometry(LatentModelSettings(model=folder)).usage
    assert usage.sampler == plain.replace("clip_sample=False", "clip_sample=False, thresholding=False")
    names, load = usage.regenerating()
    known: dict[str, Any] = {}
    exec(f"import torch\nfrom diffusers import {', '.join(names)}\n{load}", known)
    config = known["pipe"].scheduler.config
    assert (config.thresholding, config.clip_sample) == (False, False)
    assert "torch_dtype" not in load + capfd.readouterr().err


STOCK = (
    {"class": "EulerDiscreteScheduler", "timestep_spacing": "linspace", "use_karras_sigmas": True},
    {"class": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing", "solver_order": 1},
    {"class": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    {"class": "PNDMScheduler", "skip_prk_steps": True},
    {"steps_offset": 0},
    None,
)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("sampler", ["ddim", *range(len(STOCK))])
def test_the_lines_of_a_card_make_the_same_model(
    folders: dict[str, str], tmp_path: Path, kind: str, sampler: str | int
) -> None:
    settings = LatentModelSettings(
        model=folders[kind], device="cpu",
        vae=rescaled(tiny_stable_diffusion.build(tmp_path / "other", seed=1), tmp_path / "vae"),
        scheduler={"class": "UniPCMultistepScheduler", "timestep_spacing": "trailing"},
    )  # fmt: skip
    if isinstance(sampler, int):
        changes = {**settings.model_dump(), "scheduler": STOCK[sampler], "sampler": "model"}
        settings = SamplingSettings.model_validate(changes)
    model = open_latent_model(settings)
    _, load = model.geometry.usage.regenerating()
    assert ("pipe.scheduler" in load) == (settings.scheduler is not None)
    check_card_lines(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas has no effect on DDIM"),
        ({"clip_sample": True}, "clip_sample has no effect on DDIM.*set sampler: model"),
        ({"class": "DPMSolverMultistepScheduler", "solver_order": 1}, "solver_order has no effect on DDIM"),
    ],
)
def test_what_ddim_does_not_heed_is_refused_where_it_is_run(
    folders: dict[str, str], changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read_geometry(SamplingSettings(model=folders["sd"], scheduler=changes))
    assert read_geometry(LatentModelSettings(model=folders["sd"], scheduler=changes)).sampler == "ddim"


def test_a_model_whose_folder_names_two_samplers_has_to_say_which(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "EulerDiscreteScheduler"}))
    with pytest.raises(ValueError, match="loads a DDIMScheduler, but its scheduler's configuration is of a Euler"):
        read_geometry(SamplingSettings(model=folder, sampler="model"))
    which = SamplingSettings(model=folder, sampler="model", scheduler={"class": "DDIMScheduler"})
    assert read_geometry(which).scheduler["_class_name"] == "DDIMScheduler"


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_guidance_that_is_an_input_is_told_as_the_pipeline_tells_it(tmp_path: Path, kind: str) -> None:
    """Latent consistency models: one pass a call, whatever the guidance; trailing times."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = tiny_stable_diffusion.build(tmp_path / kind, kind, time_cond_proj_dim=8)
    trailing = {"timestep_spacing": "trailing"}
    model = open_latent_model(LatentModelSettings(model=folder, device="cpu", scheduler=trailing))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    torch.nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight)  # starts at nothing
    model.unet.load_state_dict(pipe.unet.state_dict())
    noise = torch.randn(2, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts, drawn = ["red star", "blue circle"], []
    for guidance in (1.0, 8.0):
        told = {"num_inference_steps": 4, "guidance_scale": guidance, "latents": noise}
        wanted = pipe(prompts, output_type="latent", **told).images
        z = sample(model.predictor(guidance), model.schedule(4), noise, model.condition(prompts, guided=guidance > 1))
        torch.testing.assert_close(z, wanted, rtol=1e-3, atol=1e-4)
        drawn.append(z)
    assert float((drawn[0] - drawn[1]).abs().max()) > 1e-3
