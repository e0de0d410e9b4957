"""The stages against a plain loop of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from index import gaussian
from stages.embed.preparation import PixelTransform
from stages.embed.settings import AdoptSettings, EmbedSettings
from stages.embed.stage import Adopt, Embed
from stages.models import clip
from tests.support.pictures import awkward_pictures
from tests.support.tiny_kandinsky import build_prior
from tests.support.tiny_stable_diffusion import tokenizer


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_prior(tmp_path_factory.mktemp("models") / "prior")


def _rows() -> list[dict[str, object]]:
    return [{"id": str(i), "image": picture} for i, picture in enumerate(awkward_pictures() * 3)]


def test_embeddings_equal_a_plain_loop(prior: str) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(prior, subfolder="image_encoder").eval()
    processor = CLIPImageProcessor.from_pretrained(prior, subfolder="image_processor")
    stage = Embed(EmbedSettings(encoder=prior, batch_size=4), device="cpu")
    found = {row["id"]: row for row in stage(_rows())}
    assert len(found) == len(_rows())
    for row in _rows():
        with torch.no_grad():
            pixels = processor(images=row["image"], return_tensors="pt").pixel_values
            wanted_E = model(pixel_values=pixels).image_embeds[0].numpy()
        out = found[row["id"]]
        assert out["status"] == "ok"
        assert np.abs(out["embedding"] - wanted_E).max() < 1e-5 * np.abs(wanted_E).max()
        assert out["norm"] == pytest.approx(np.linalg.norm(wanted_E), rel=1e-5)


def _clip(folder: Path) -> str:
    """A CLIP model as it comes from the hub: both towers and both processors in one folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    words = tokenizer(16)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def _siglip(folder: Path) -> str:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    words = tokenizer(16)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 24}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    words.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("build", [_clip, _siglip])
def test_plain_models_give_their_own_features(build: Callable[[Path], str], tmp_path: Path) -> None:
    """Pictures and prompts against the whole model's own two methods, on what its own processors prepare."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    torch.manual_seed(0)
    folder = build(tmp_path / "model")
    model = AutoModel.from_pretrained(folder).eval()
    processor, words = AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
    pictures, prompts = awkward_pictures(), ["a red star", "a photo of a large blue circle in ice", "heart"]
    with torch.no_grad():
        pixels = torch.cat([processor(images=picture, return_tensors="pt").pixel_values for picture in pictures])
        wanted_BE = model.get_image_features(pixel_values=pixels).pooler_output
        tokens = words(prompts, padding="max_length", max_length=16, return_tensors="pt")
        attended = {} if build is _siglip else {"attention_mask": tokens.attention_mask}
        text_BE = model.get_text_features(input_ids=tokens.input_ids, **attended).pooler_output
    stage = Embed(EmbedSettings(encoder=folder, batch_size=4), device="cpu")
    assert stage.preparation.is_split
    found = {row["id"]: row["embedding"] for row in stage(_rows()[: len(pictures)])}
    assert np.allclose(np.stack([found[str(i)] for i in range(len(pictures))]), wanted_BE, atol=1e-5)
    assert Embed.describe(EmbedSettings(encoder=folder)).columns[0].shape == (wanted_BE.shape[1],)
    assert np.allclose(clip.TextEncoder(folder)(prompts), text_BE, atol=1e-5)
    assert clip.has_text_encoder(folder)
    assert clip.identity(folder, "image")["fingerprint"] == clip.identity(folder, "text")["fingerprint"]


def test_order_and_split_change_no_byte(prior: str) -> None:
    stage = Embed(EmbedSettings(encoder=prior, batch_size=4), device="cpu")
    rows = _rows()
    once = {row["id"]: row["embedding"].tobytes() for row in stage(rows)}
    other = {}
    for part in (rows[9:], rows[4:9][::-1], rows[:4]):
        other |= {row["id"]: row["embedding"].tobytes() for row in stage(part)}
    assert once == other


def test_the_summary_is_of_what_was_stored(prior: str) -> None:
    stage = Embed(EmbedSettings(encoder=prior, batch_size=4, store="float16"), device="cpu")
    done = list(stage(_rows()))
    stored_NE = np.stack([row["embedding"] for row in done])
    assert stored_NE.dtype == np.float16
    found = summed(stage, done)
    assert np.allclose(found.mean_E, stored_NE.astype(np.float64).mean(0), rtol=1e-12)
    assert found.rows == len(stored_NE)
    assert summed(stage, []).rows == 0


def summed(stage: Embed | Adopt, rows: list[Any]) -> gaussian.Moments:
    """What is kept beside a shard of these rows."""
    tally = stage.tally()
    for row in rows:
        tally.add(row)
    return gaussian.Moments.from_arrays(tally.summary())


def test_rows_without_a_picture_fail_alone(prior: str) -> None:
    stage = Embed(EmbedSettings(encoder=prior, batch_size=4), device="cpu")
    rows = [{"id": "none"}, *_rows()[:2], {"id": "text", "image": "no picture"}]
    found = {row["id"]: row for row in stage(rows)}
    assert {name: row["status"] for name, row in found.items()} == {
        "none": "failed", "0": "ok", "1": "ok", "text": "failed",
    }  # fmt: skip
    assert "input.columns" in found["none"]["error"]
    assert summed(stage, list(found.values())).rows == 2


def test_out_of_memory_halves_the_batch(prior: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Embed(EmbedSettings(encoder=prior, batch_size=8), device="cpu")
    wanted = {row["id"]: row["embedding"] for row in stage(_rows())}
    real = stage._forward

    def forward(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if len(pixels_BCHW) > 2:
            raise torch.OutOfMemoryError("too much")
        return real(pixels_BCHW)

    monkeypatch.setattr(stage, "_forward", forward)
    found = {row["id"]: row["embedding"] for row in stage(_rows())}
    assert stage.batch_size == 2
    assert found.keys() == wanted.keys()
    assert all(np.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def test_given_embeddings_are_checked() -> None:
    stage = Adopt(AdoptSettings(dim=3, store="float16"))
    rows = [
        {"id": "list", "embedding": [1.0, 2.0, 2.0]},
        {"id": "array", "embedding": np.array([0.0, 0.0, 4.0], np.float32)},
        {"id": "short", "embedding": [1.0]},
        {"id": "nan", "embedding": [1.0, float("nan"), 0.0]},
        {"id": "large", "embedding": [1e6, 0.0, 0.0]},
        {"id": "missing"},
        {"id": "null", "embedding": None},
    ]
    found = {row["id"]: row for row in stage(rows)}
    assert [name for name, row in found.items() if row["status"] == "ok"] == ["list", "array"]
    assert found["list"]["norm"] == 3.0
    assert "shape" in found["short"]["error"]
    assert "float16" in found["large"]["error"]
    assert summed(stage, list(found.values())).rows == 2


def test_description_needs_no_weights(prior: str, tmp_path: Path) -> None:
    info = Embed.describe(EmbedSettings(encoder=prior, store="float16", batch_size=4))
    assert info.columns[0].shape == (24,)
    assert info.columns[0].dtype == "float16"
    other = Embed.describe(EmbedSettings(encoder=build_prior(tmp_path / "other", seed=1)))
    assert info.models["image_encoder"]["fingerprint"] != other.models["image_encoder"]["fingerprint"]
    copied = Embed.describe(EmbedSettings(encoder=build_prior(tmp_path / "same")))
    assert info.models["image_encoder"]["fingerprint"] == copied.models["image_encoder"]["fingerprint"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_finds_its_batch_and_agrees_with_the_cpu(prior: str) -> None:
    gpu, cpu = (
        Embed(EmbedSettings(encoder=prior), device="cuda"),
        Embed(EmbedSettings(encoder=prior, batch_size=4), device="cpu"),
    )
    assert gpu.batch_size >= 1
    a = {row["id"]: row["embedding"] for row in gpu(_rows())}
    b = {row["id"]: row["embedding"] for row in cpu(_rows())}
    assert all(np.abs(a[name] - b[name]).max() < 1e-3 * np.abs(b[name]).max() for name in b)


def test_missing_weights_are_refused_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _clip(tmp_path / "model")
    weights = load_file(f"{folder}/model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    clip.TextEncoder(folder)
    with pytest.raises(clip.ModelError, match=r"1 weights are missing, among them visual_projection"):
        clip.ImageEncoder(folder)


def test_long_pictures_are_prepared_within_the_crop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What resizing the whole picture and cropping it gives, without a picture of that size."""
    transform = PixelTransform(64, None, 3, (64, 64), 1 / 255, (0.0,) * 3, (1.0,) * 3)
    noise = np.random.default_rng(0).integers(0, 256, (1300, 9, 3), dtype=np.uint8)
    for values in (noise, noise.transpose(1, 0, 2), noise[:, :1], np.repeat(noise, 80, axis=1).repeat(80, axis=0)):
        picture = Image.fromarray(np.ascontiguousarray(values))
        width, height = picture.size
        long = int(64 * max(width, height) / min(width, height))
        whole = picture.resize((64, long) if width <= height else (long, 64), resample=3)
        top, left = (whole.height - 64) // 2, (whole.width - 64) // 2
        expected = np.asarray(whole).astype(int)[top : top + 64, left : left + 64]
        difference = abs(transform.shape(picture).astype(int) - expected)
        assert difference.max() <= 8
        assert difference.mean() < 0.1
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(picture: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        sizes.append(size)
        return resize(picture, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert transform.shape(Image.new("RGB", (65000, 1))).shape == (64, 64, 3)
    assert max(max(size) for size in sizes) <= 64
