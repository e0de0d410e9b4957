"""A model at an address is the model of its folder: fetched once a machine, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

import micro
from jobs.run import run_job
from micro.oracle import Oracle
from stages.models import clip
from stages.models.copies import _copy, here
from stages.models.families import open_latent_model, read_geometry
from stages.models.fingerprint import describe_model
from stages.models.latent import Place
from stages.models.settings import LatentModelSettings
from tests.support import one_file, tiny_flows, tiny_stable_diffusion
from tests.support.in_process import without_ray
from tests.support.weather import s3_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_stable_diffusion.build(tmp_path_factory.mktemp("models") / "sd"))


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where copies are kept."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    _copy.cache_clear()
    clip.locate.cache_clear()
    yield tmp_path / "tmp"
    _copy.cache_clear()
    clip.locate.cache_clear()


@pytest.fixture
def memory() -> Iterator[Any]:
    """A store in memory that counts the files which it hands out."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.fixture
def fetched(memory: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    get = type(memory).get_file

    def counted(self: Any, path: str, target: str, **options: Any) -> None:
        names.append(path)
        get(self, path, target, **options)

    monkeypatch.setattr(type(memory), "get_file", counted)
    return names


def _anew() -> None:
    """As another process would."""
    _copy.cache_clear()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux-dev", "sd3"])
def test_it_is_the_folders_model_to_the_bit(kind: str, memory: Any, tmp_path: Path) -> None:
    builder = tiny_flows if kind in tiny_flows.KINDS else tiny_stable_diffusion
    folder = builder.build(tmp_path / kind, kind)  # type: ignore[attr-defined]
    memory.put(f"{folder}/", f"/bucket/{kind}/", recursive=True)
    far, near = (LatentModelSettings(model=name, device="cpu") for name in (f"memory://bucket/{kind}", folder))
    told, known = read_geometry(far).fingerprints(), read_geometry(near).fingerprints()
    assert {part: found["path"] for part, found in told.items()} == {
        part: found["path"].replace(folder, f"memory://bucket/{kind}") for part, found in known.items()
    }
    assert [found["fingerprint"] for found in told.values()] == [found["fingerprint"] for found in known.values()]
    Path(folder).rename(tmp_path / "away")
    one = open_latent_model(far)
    (tmp_path / "away").rename(folder)
    other = open_latent_model(near)
    x = torch.rand((1, 3, 16, 16)) * 2 - 1
    assert torch.equal(one.encode(x), other.encode(x))
    conditions = [model.condition(["a red star"]) for model in (one, other)]
    assert all(torch.equal(value, conditions[1][name]) for name, value in conditions[0].items())


def test_every_kind_of_model(memory: Any, tmp_path: Path) -> None:
    for name in ("prior", "decoder", "oracle"):
        memory.put(f"{micro.MODELS / name}/", f"/models/{name}/", recursive=True)
    far = "memory://models"
    for role in ("image", "text"):
        one, other = clip.identity(f"{far}/prior", role), clip.identity(str(micro.MODELS / "prior"), role)  # type: ignore[arg-type]
        assert one == {**other, "path": f"{far}/prior"}
    assert clip.embedding_width(f"{far}/prior") == clip.embedding_width(str(micro.MODELS / "prior"))
    texts = [clip.TextEncoder(path)(["a red star"]) for path in (f"{far}/prior", str(micro.MODELS / "prior"))]
    assert torch.equal(*texts)
    from diffusers import UNet2DConditionModel

    part = Place(f"{far}/decoder", None, "unet")
    assert part.load(UNet2DConditionModel, torch.float32).config.cross_attention_dim
    assert (
        part.identity()["fingerprint"] == Place(str(micro.MODELS / "decoder"), None, "unet").identity()["fingerprint"]
    )
    assert describe_model(f"{far}/oracle")["fingerprint"] == describe_model(str(micro.MODELS / "oracle"))["fingerprint"]
    assert Oracle.load(here(f"{far}/oracle"))


def test_files_of_their_own(folder: Path, memory: Any, tmp_path: Path) -> None:
    """A checkpoint of one file with its configuration, an autoencoder, and a LoRA."""
    file = one_file.write(str(folder), tmp_path / "model.safetensors")
    weight = "text_model.encoder.layers.0.self_attn.q_proj"
    tiny = {
        f"text_encoder.{weight}.lora_A.weight": torch.ones(1, 32),
        f"text_encoder.{weight}.lora_B.weight": torch.ones(32, 1),
    }
    save_file(tiny, tmp_path / "style.safetensors")
    memory.put(file, "/bucket/model.safetensors")
    memory.put(str(tmp_path / "style.safetensors"), "/bucket/style.safetensors")
    memory.put(f"{folder}/", "/bucket/sd/", recursive=True)
    near = {
        "model": file,
        "config": str(folder),
        "vae": f"{folder}/vae",
        "loras": [{"path": f"{tmp_path}/style.safetensors"}],
    }
    far = {
        "model": "memory://bucket/model.safetensors", "config": "memory://bucket/sd", "vae": "memory://bucket/sd/vae",
        "loras": [{"path": "memory://bucket/style.safetensors"}],
    }  # fmt: skip
    here_, there = (LatentModelSettings.model_validate({**told, "device": "cpu"}) for told in (near, far))
    fingerprints = [
        {part: found["fingerprint"] for part, found in read_geometry(told).fingerprints().items()}
        for told in (here_, there)
    ]
    assert fingerprints[0] == fingerprints[1]
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(open_latent_model(here_).decode(z), open_latent_model(there).decode(z))
    lines = read_geometry(there).usage.regenerating()[1]
    assert 'fsspec.url_to_fs("memory://bucket/model.safetensors")' in lines
    assert 'from_single_file("model.safetensors", config="config", vae=vae' in lines
    assert 'load_lora_weights(".", weight_name="lora_0.safetensors")' in lines


def test_the_cards_lines_bring_it_to_where_they_run(
    folder: Path, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.put(f"{folder}/", "/bucket/sd/", recursive=True)
    names, code = read_geometry(LatentModelSettings(model="memory://bucket/sd", device="cpu")).usage.regenerating()
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(f"import torch\nfrom diffusers import {', '.join(names)}\n{code}", space)
    assert type(space["pipe"]).__name__ == "StableDiffusionPipeline"
    assert (tmp_path / "model/model_index.json").is_file()


def test_fetched_once_and_only_what_is_read(folder: Path, memory: Any, fetched: list[str], copies: Path) -> None:
    memory.put(f"{folder}/", "/bucket/sd/", recursive=True)
    for extra in ("unet/diffusion_pytorch_model.bin", "sd.safetensors", "sd.ckpt", "vae/model.onnx", ".git/config"):
        memory.pipe_file(f"/bucket/sd/{extra}", b"x")
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: (_anew(), here("memory://bucket/sd"))[1], range(6)))
    (copy,) = paths
    expected = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert sorted(name.removeprefix("/bucket/sd/") for name in fetched) == expected
    assert sorted(str(path.relative_to(copy)) for path in Path(copy).rglob("*") if path.is_file()) == expected


def test_a_swept_file_is_fetched_again_and_a_new_version_beside_the_old(
    folder: Path, memory: Any, fetched: list[str]
) -> None:
    memory.put(f"{folder}/", "/bucket/sd/", recursive=True)
    first = Path(here("memory://bucket/sd"))
    (first / "unet/config.json").unlink()
    _anew()
    assert Path(here("memory://bucket/sd")) == first
    assert (first / "unet/config.json").is_file()
    config = json.loads((folder / "unet/config.json").read_text())
    memory.pipe_file("/bucket/sd/unet/config.json", json.dumps({**config, "sample_size": 16}).encode())
    assert Path(here("memory://bucket/sd")) == first  # a process goes by one version
    _anew()
    second = Path(here("memory://bucket/sd"))
    assert second != first
    assert json.loads((second / "unet/config.json").read_text())["sample_size"] == 16
    assert json.loads((first / "unet/config.json").read_text()) == config


def test_half_a_model_is_none(folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, copies: Path) -> None:
    memory.put(f"{folder}/", "/bucket/sd/", recursive=True)
    get = type(memory).get_file

    def cut(self: Any, path: str, target: str, **options: Any) -> None:
        get(self, path, target, **options)
        if path.endswith("unet/config.json"):
            Path(target).write_bytes(b"{")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", cut)
        with pytest.raises(OSError, match=r"unet/config.json: 1 of \d+ bytes were fetched"):
            here("memory://bucket/sd")
    assert not [path for path in copies.rglob("*") if path.is_dir() and path.parent != copies]
    assert (Path(here("memory://bucket/sd")) / "unet/config.json").read_bytes() == (
        folder / "unet/config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://bucket/nothing", "no model at memory://bucket/nothing: nothing lies there"),
        ("nosuch://bucket/sd", "nosuch://bucket/sd: Protocol not known: nosuch"),
    ],
)
def test_nothing_there_is_a_sentence(memory: Any, address: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_geometry(LatentModelSettings(model=address))
    with pytest.raises(clip.ModelError, match=said):
        clip.embedding_width(address)


def test_a_password_in_an_address_is_refused() -> None:
    with pytest.raises(ValidationError, match="holds a password"):
        LatentModelSettings(model="s3://me:hush@bucket/sd")


def test_a_job_with_its_model_on_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys stand in the job's `storage_options` alone; the same rows as with the folder; a rerun finds all done."""
    pytest.importorskip("s3fs")
    without_ray(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "in").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((64, 64)).save(tmp_path / "in/a.png")
    job = {
        "job": "invert-images",
        "input": str(tmp_path / "in"),
        "methods": [{"method": "ddim"}],
        "steps": 2,
        "device": "cpu",
    }
    with s3_server() as port:
        options = {"key": "test", "secret": "hush-hush", "endpoint_url": f"http://127.0.0.1:{port}"}
        store = fsspec.filesystem("s3", **options)
        store.put(f"{folder}/", "bucket/sd/", recursive=True)
        far = {**job, "model": "s3://bucket/sd", "storage_options": options}
        outputs = []
        for name, told in (("far", far), ("near", {**job, "model": str(folder)})):
            assert run_job(told, output=str(tmp_path / name)).state == "complete"
            outputs.append(ds.dataset(str(tmp_path / name / "data")).to_table(columns=["id", "latent", "psnr"]))
        again = run_job(far, output=str(tmp_path / "far"))
        assert (again.state, again.resumed) == ("complete", 1)
    assert outputs[0].equals(outputs[1])
    plan = (tmp_path / "far/_latentmill/plan.json").read_text()
    assert "hush-hush" not in plan
    assert json.loads(plan)["models"]["unet"]["path"] == "s3://bucket/sd/unet"
    assert "s3://bucket/sd" in (tmp_path / "far/README.md").read_text()
