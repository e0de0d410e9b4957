"""`store_path`: the latents on the way from a picture to its noise, against the stock pipelines' own way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import micro
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import read_geometry
from tests.stages.inversion.test_stage import picture
from tests.support import tiny_flows, tiny_stable_diffusion

SOLVED = {"method": "lbo", "tolerance": 1e-6, "passes": 60}
STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "flux-dev": tiny_flows.build(tmp_path_factory.mktemp("flux"), "flux-dev"),
        "stable-diffusion": tiny_stable_diffusion.build(tmp_path_factory.mktemp("sd")),
    }


def told(folder: str, **options: Any) -> InvertImagesSettings:
    return InvertImagesSettings(**{"model": folder, "methods": (SOLVED,), "device": "cpu", "steps": STEPS, **options})


def rows(settings: InvertImagesSettings, size: tuple[int, int] = (16, 16), count: int = 1) -> list[dict[str, Any]]:
    labels = [method.label for method in settings.methods]
    given = [
        {"id": f"{i}/{label}", "image": picture(i, size), "prompt": "red star", "method": label}
        for i in range(count)
        for label in labels
    ]
    stage, columns = InvertImages(settings), {one.name: one for one in InvertImages.describe(settings).columns}
    done = sorted(stage(given), key=lambda row: row["id"])
    for row in done:
        assert row["status"] == "ok", row["error"]
        for name in ("path_latents", "path_times", "path_alphas", "path_sigmas"):
            assert len(columns[name].shape) == np.ndim(row[name])
            assert all(a in (-1, b) for a, b in zip(columns[name].shape, np.shape(row[name]), strict=True))
    return done


def test_the_way_is_the_stock_pipeline_s_own_way_back(folders) -> None:
    """The shipped model: of a random one a step may have no solution."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    shipped = str(micro.MODELS / "stable-diffusion")
    (row,) = rows(told(shipped, store_path="all"), (64, 64))
    pipe = StableDiffusionPipeline.from_pretrained(shipped, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    passed: list[np.ndarray] = []

    def note(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        passed.append(given["latents"][0].numpy().copy())
        return {}

    pipe("red star", latents=torch.tensor(row["latent"])[None], num_inference_steps=STEPS, guidance_scale=1.0,
         callback_on_step_end=note, output_type="latent")  # fmt: skip
    path = row["path_latents"]
    assert path.shape == (STEPS, *row["latent"].shape)
    for mine, theirs in zip(path, passed[::-1], strict=True):
        assert np.abs(mine - theirs).max() < 1e-3 * np.abs(theirs).max()
    assert np.abs(path[1] - path[0]).max() > 1e-2  # they are not all one
    times = pipe.scheduler.timesteps.numpy()[::-1]
    assert row["path_times"].tolist() == [0, *times[:-1]]
    signal = pipe.scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(row["path_alphas"][1:], np.sqrt(signal[times[:-1]]), rtol=1e-6)
    np.testing.assert_allclose(row["path_sigmas"][1:], np.sqrt(1 - signal[times[:-1]]), rtol=1e-6)
    np.testing.assert_allclose(row["path_alphas"] ** 2 + row["path_sigmas"] ** 2, 1, atol=1e-6)


def test_the_way_of_a_flow_is_the_stock_pipeline_s(folders) -> None:
    from diffusers import FluxPipeline

    settings = told(folders["flux-dev"], store_path="all")
    size = read_geometry(settings).picture_size
    (row,) = rows(settings, size)
    pipe = FluxPipeline.from_pretrained(folders["flux-dev"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    channels, high, wide = np.shape(row["latent"])
    passed: list[np.ndarray] = []

    def note(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        packed = given["latents"][0].reshape(high // 2, wide // 2, channels, 2, 2)
        passed.append(packed.permute(2, 0, 3, 1, 4).reshape(channels, high, wide).numpy().copy())
        return {}

    seed = torch.tensor(row["latent"])[None]
    packed = pipe._pack_latents(seed, 1, channels, high, wide)
    pipe("red star", latents=packed, num_inference_steps=STEPS, guidance_scale=1.0, height=size[1], width=size[0],
         callback_on_step_end=note, output_type="latent")  # fmt: skip
    for mine, theirs in zip(row["path_latents"], passed[::-1], strict=True):
        assert np.abs(mine - theirs).max() < 1e-3 * np.abs(theirs).max()
    sigmas = pipe.scheduler.sigmas.numpy()[::-1]
    np.testing.assert_allclose(row["path_sigmas"], sigmas[:-1], atol=1e-7)
    np.testing.assert_allclose(row["path_alphas"], 1 - sigmas[:-1], atol=1e-7)


def test_fewer_are_some_of_all_and_begin_with_the_picture_s_own(folders) -> None:
    """By every kind of method, boosted and stored in half precision too."""
    methods = (
        {"method": "ddim"}, SOLVED, {"method": "lbo", "name": "replay", "replay": True}, {"method": "null-text"},
        {"method": "lbo", "name": "boosted", "ilb": {"iterations": 4, "warmup": 1}},
        {"method": "lbo", "name": "again", "retries": 2, "passes": 1},
    )  # fmt: skip
    folder = folders["stable-diffusion"]
    every = rows(told(folder, methods=methods, store_path="all", slots=2), count=3)
    some = rows(told(folder, methods=methods, store_path=2, store="float16", slots=2), count=3)
    assert len(every) == len(some) == 18
    stage = InvertImages(told(folder))
    for one, few in zip(every, some, strict=True):
        assert few["path_latents"].dtype == np.float16
        np.testing.assert_allclose(few["path_latents"], one["path_latents"][[0, 3]], rtol=2e-3, atol=2e-3)
        assert few["path_times"].tolist() == one["path_times"][[0, 3]].tolist()
        own = picture(int(one["id"][0]))
        z_0 = one["latent_0"] if one["method"] == "boosted" else encoded(stage, own)
        np.testing.assert_allclose(one["path_latents"][0], z_0, atol=1e-5)


def encoded(stage: InvertImages, own: Any) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(own).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        z_BCHW: torch.Tensor = stage.model.encode(pixels)
    return z_BCHW[0].numpy()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"store_path": STEPS + 1}, "store_path: 7 are more than the 6 steps; take all"),
        ({"store_path": 0}, "store_path"),
        ({"store_path": True}, "store_path"),
        ({"store_path": "some"}, "store_path"),
        ({"store_path": "all", "methods": ({"method": "belm"},)}, "store_path: method belm has no such way"),
        ({"store_path": 1, "methods": (SOLVED, {"method": "edict"})}, "store_path: method edict has no such way"),
    ],
)
def test_what_cannot_be_kept_is_refused(folders, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        told(folders["stable-diffusion"], **options)


def test_a_sampler_whose_steps_hang_together_keeps_no_way(folders) -> None:
    changes = {"sampler": "model", "scheduler": {"class": "UniPCMultistepScheduler"}}
    settings = told(folders["stable-diffusion"], store_path=2, **changes)
    with pytest.raises(ValueError, match="store_path: the steps of the model's sampler hang together"):
        InvertImages.describe(settings)
