"""Each decoder draws what diffusers' own pipeline draws, called by hand; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.decode.settings import DecodeSettings
from stages.decode.stage import DecodeEmbeddings
from stages.engine.randomness import row_generator
from stages.models.kandinsky import DecoderError
from tests.support import tiny_decoders, tiny_kandinsky, tiny_stable_diffusion

SEED, STEPS, GUIDANCE = 3, 3, 4.0
Z_BE = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
IDS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("decoders")
    found = {
        "prior": tiny_kandinsky.build_prior(folder / "prior"),
        "kandinsky": tiny_kandinsky.build_decoder(folder / "kandinsky"),
        "unclip": tiny_decoders.build_unclip(folder / "unclip"),
        "sd": tiny_stable_diffusion.build(folder / "sd"),
        "sdxl": tiny_stable_diffusion.build(folder / "sdxl", "sdxl"),
    }
    found["cascade"], found["cascade-prior"] = tiny_decoders.build_cascade(folder / "cascade")
    for kind in ("sd", "sdxl"):
        found[f"{kind}-adapter"] = tiny_decoders.build_ip_adapter(folder / f"{kind}.safetensors", found[kind])
    return found


def settings(models: dict[str, str], kind: str, **more: Any) -> DecodeSettings:
    decode: dict[str, Any] = {"model": models[kind], "steps": STEPS, "guidance": GUIDANCE, "size": 16, "batch_size": 2}
    if kind in ("sd", "sdxl"):
        decode["ip_adapter"] = {"path": models[f"{kind}-adapter"], "scale": 0.7}
    if kind == "cascade":
        decode |= {"prior": models["cascade-prior"], "size": 32}
    encoder = models["prior"] if kind == "kandinsky" else None
    return DecodeSettings(decode=decode | more, seed=SEED, encoder=encoder)  # type: ignore[arg-type]


def drawn(given: DecodeSettings) -> list[np.ndarray]:
    rows = [{"id": name, "embedding": z_E.tolist()} for name, z_E in zip(IDS, Z_BE, strict=True)]
    done = {row["id"]: row for row in DecodeEmbeddings(given, device="cpu")(rows)}
    assert [done[name]["status"] for name in IDS] == ["ok"] * 3
    return [np.asarray(done[name]["image"]).astype(int) for name in IDS]


def by_hand(models: dict[str, str], kind: str, b: int, guidance: float, noise_level: int) -> np.ndarray:
    """The picture of embedding b by the stock pipeline, alone in its batch."""
    from diffusers import DiffusionPipeline, KandinskyV22PriorPipeline

    if kind == "cascade":
        return cascade_by_hand(models, b, guidance)
    pipe = DiffusionPipeline.from_pretrained(models[kind], **({"safety_checker": None} if kind == "sd" else {}))
    pipe.set_progress_bar_config(disable=True)
    z_1E = Z_BE[b : b + 1]
    given: dict[str, Any] = {}
    if kind == "kandinsky":
        prior = KandinskyV22PriorPipeline.from_pretrained(models["prior"])
        given = {"image_embeds": z_1E, "negative_image_embeds": prior.get_zero_embed()}
    elif kind == "unclip":
        given = {"prompt": "", "image_embeds": z_1E, "noise_level": noise_level}
    else:
        file = Path(models[f"{kind}-adapter"])
        pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.7)
        z_11E = z_1E[None]
        pair = torch.cat([torch.zeros_like(z_11E), z_11E]) if guidance > 1 else z_11E
        given = {"prompt": "", "ip_adapter_image_embeds": [pair]}
    picture = pipe(
        **given, num_inference_steps=STEPS, guidance_scale=guidance, height=16, width=16,
        generator=row_generator(SEED, IDS[b], "decode"),
    ).images[0]  # fmt: skip
    return np.asarray(picture).astype(int)


def cascade_by_hand(models: dict[str, str], b: int, guidance: float) -> np.ndarray:
    """The stock pipelines, made of their parts: `from_pretrained` of diffusers 0.42 does not find the autoencoder."""
    from diffusers import (
        DDPMWuerstchenScheduler,
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
        StableCascadeUNet,
    )
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    def parts(folder: str, **kinds: Any) -> dict[str, Any]:
        shared = {"text_encoder": CLIPTextModelWithProjection, "tokenizer": CLIPTokenizer}
        every = {**shared, "scheduler": DDPMWuerstchenScheduler, **kinds}
        return {name: kind.from_pretrained(folder, subfolder=name) for name, kind in every.items()}

    own = parts(models["cascade"], decoder=StableCascadeUNet, vqgan=PaellaVQModel)
    decoder = StableCascadeDecoderPipeline(**own, latent_dim_scale=8.0)
    own = parts(models["cascade-prior"], prior=StableCascadeUNet)
    prior = StableCascadePriorPipeline(**own, resolution_multiple=16.0)
    generator = row_generator(SEED, IDS[b], "decode")
    latent = prior(
        prompt="", image_embeds=Z_BE[b].reshape(1, 1, 24), num_inference_steps=STEPS, guidance_scale=guidance,
        height=32, width=32, generator=generator,
    ).image_embeddings  # fmt: skip
    return np.asarray(decoder(latent, prompt="", generator=generator).images[0]).astype(int)


@pytest.mark.parametrize(
    ("kind", "guidance", "noise_level"),
    [
        ("kandinsky", 4.0, 0),
        ("unclip", 4.0, 0),
        ("unclip", 1.0, 300),
        ("sd", 4.0, 0),
        ("sd", 1.0, 0),
        ("sdxl", 4.0, 0),
        ("cascade", 4.0, 0),
        ("cascade", 1.0, 0),
    ],
)
def test_a_decoder_draws_what_the_stock_pipeline_draws(
    models: dict[str, str], kind: str, guidance: float, noise_level: int
) -> None:
    more = {"noise_level": noise_level} if noise_level else {}
    ours = drawn(settings(models, kind, guidance=guidance, **more))
    for b in range(3):
        # A batch of two may round otherwise than one: a level of 255 at most.
        assert np.abs(ours[b] - by_hand(models, kind, b, guidance, noise_level)).max() <= 1


@pytest.mark.parametrize("kind", ["kandinsky", "unclip", "sd", "sdxl", "cascade"])
def test_the_embedding_decides_what_is_drawn(models: dict[str, str], kind: str) -> None:
    stage = DecodeEmbeddings(settings(models, kind), device="cpu")
    first, second = (
        np.asarray(stage.decoder.pictures(z_E[None], ["same"])[0]).astype(int) for z_E in (Z_BE[0], -Z_BE[0])
    )
    assert np.abs(first - second).max() > 3


@pytest.mark.parametrize("kind", ["kandinsky", "unclip", "sd", "sdxl", "cascade"])
def test_embeddings_that_do_not_fit_fail_alone(models: dict[str, str], kind: str) -> None:
    given = settings(models, kind)
    rows = [
        {"id": "narrow", "embedding": [1.0] * 5}, {"id": "none", "embedding": None},
        {"id": "words", "embedding": "a star"}, {"id": "infinite", "embedding": [float("inf")] * 24},
        {"id": "good", "embedding": Z_BE[0].numpy()},
    ]  # fmt: skip
    done = {row["id"]: row for row in DecodeEmbeddings(given, device="cpu")(rows)}
    assert {name: row["status"] for name, row in done.items()} == {
        "narrow": "failed", "none": "failed", "words": "failed", "infinite": "failed", "good": "ok"
    }  # fmt: skip
    assert f"width 5, the decoder {given.decode.model} takes 24" in done["narrow"]["error"]
    assert "not finite" in done["infinite"]["error"]
    assert "no list of numbers" in done["words"]["error"]


def test_settings_that_do_not_fit_a_decoder_are_refused_before_the_run(models: dict[str, str], tmp_path: Path) -> None:
    def refused(given: DecodeSettings) -> str:
        with pytest.raises(DecoderError) as error:
            DecodeEmbeddings.describe(given)
        return str(error.value)

    assert "belongs to Stable unCLIP" in refused(settings(models, "sd", noise_level=3))
    assert "give 0 to 999" in refused(settings(models, "unclip", noise_level=1000))
    assert "set `ip_adapter`" in refused(settings(models, "sd", ip_adapter=None))
    adapter = {"path": models["sd-adapter"]}
    assert "belongs to Stable Diffusion" in refused(settings(models, "unclip", ip_adapter=adapter))
    assert "KandinskyV22PriorPipeline draws nothing" in refused(settings(models, "prior"))
    assert "no pipeline can be loaded" in refused(settings(models | {"sd": str(tmp_path)}, "sd"))
    assert "name the file itself" in refused(settings(models, "sd", ip_adapter={"path": str(tmp_path)}))
    assert "`prior` belongs to Stable Cascade" in refused(settings(models, "unclip", prior=models["cascade-prior"]))
    assert "set `prior` to that pipeline" in refused(settings(models, "cascade", prior=None))
    assert "no prior of Stable Cascade" in refused(settings(models, "cascade", prior=models["sd"]))
    plain = settings(models, "kandinsky")
    assert "set `encoder`" in refused(plain.model_copy(update={"encoder": None}))
    wide = tiny_kandinsky.build_decoder(tmp_path / "wide", width=40)
    assert "width 40, the encoder gives 24" in refused(settings(models | {"kandinsky": wide}, "kandinsky"))


def test_an_adapter_of_another_model_or_kind_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(DecoderError, match="does not fit"):
        DecodeEmbeddings(settings(models, "sd", ip_adapter={"path": models["sdxl-adapter"]}), device="cpu")
    plus = tmp_path / "plus.safetensors"
    save_file({"image_proj.latents": torch.zeros(1, 4, 8)}, str(plus))
    with pytest.raises(DecoderError, match="neither of the plain kind"):
        DecodeEmbeddings.describe(settings(models, "sd", ip_adapter={"path": str(plus)}))


def test_an_adapter_plus_draws_from_hidden_states_what_the_stock_pipeline_draws_of_the_picture(
    models: dict[str, str], tmp_path: Path
) -> None:
    """The stock pipeline is shown a picture; its states, and those to contrast them with, it takes itself."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(models["prior"], subfolder="image_encoder")
    processor = CLIPImageProcessor.from_pretrained(models["prior"], subfolder="image_processor")
    adapter = {"path": tiny_decoders.build_ip_adapter(tmp_path / "plus.safetensors", models["sd"], width=32, plus=True)}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels = processor(picture, return_tensors="pt").pixel_values
    states_TD = encoder(pixels, output_hidden_states=True).hidden_states[-2][0].detach().numpy()
    rows = [
        {"id": "flat", "embedding": states_TD.reshape(-1).tolist()}, {"id": "shaped", "embedding": states_TD.tolist()},
        {"id": "short", "embedding": states_TD[:5]}, {"id": "one", "embedding": [0.0] * 32},
    ]  # fmt: skip
    for guidance in (GUIDANCE, 1.0):
        given = settings(models, "sd", ip_adapter=adapter, guidance=guidance)
        with pytest.raises(DecoderError, match="set `encoder` to the encoder of the states"):
            DecodeEmbeddings.describe(given)
        given = given.model_copy(update={"encoder": models["prior"]})
        assert "image_encoder" in DecodeEmbeddings.describe(given).models
        done = {row["id"]: row for row in DecodeEmbeddings(given, device="cpu")(dict(row) for row in rows)}
        assert [done[name]["status"] for name in ("flat", "shaped", "short", "one")] == ["ok", "ok", "failed", "failed"]
        assert f"width 32, the decoder {models['sd']} takes 17 x 32 numbers" in done["one"]["error"]
        pipe = StableDiffusionPipeline.from_pretrained(
            models["sd"], safety_checker=None, image_encoder=encoder, feature_extractor=processor
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="plus.safetensors", image_encoder_folder=None)
        for name in ("flat", "shaped"):
            wanted = pipe(
                "", ip_adapter_image=picture, num_inference_steps=STEPS, guidance_scale=guidance, height=16, width=16,
                generator=row_generator(SEED, name, "decode"),
            ).images[0]  # fmt: skip
            assert np.abs(np.asarray(done[name]["image"]).astype(int) - np.asarray(wanted).astype(int)).max() <= 1
    wide = tiny_decoders.build_ip_adapter(tmp_path / "wide.safetensors", models["sd"], width=40, plus=True)
    given = settings(models, "sd", ip_adapter={"path": wide}).model_copy(update={"encoder": models["prior"]})
    with pytest.raises(DecoderError, match=r"takes states of width 40, those of the encoder .* have 32"):
        DecodeEmbeddings.describe(given)
