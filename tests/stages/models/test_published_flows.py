"""Transformers of rectified flows as published: their sizes on the meta device, and their configurations read from a
folder without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.models.families import read_geometry
from stages.models.settings import LatentModelSettings

SD3: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
FLUX = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096}
KL = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "sample_size": 1024}
QWEN_VAE = {"base_dim": 96, "z_dim": 16, "temperal_downsample": [False, True, True]}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], float, int]] = {
    "SD3-medium": ("SD3", {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                           "pos_embed_max_size": 192}, KL, 2.03, 333),
    "SD3.5-medium": ("SD3", {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                             "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                             "dual_attention_layers": list(range(13))}, KL, 2.24, 333),
    "SD3.5-large": ("SD3", {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                            "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, KL, 8.06, 333),
    "FLUX.1-dev": ("Flux", {**FLUX, "guidance_embeds": True}, KL, 11.901408320, 512),
    "FLUX.1-schnell": ("Flux", FLUX, KL, 11.891178560, 512),
    "Qwen-Image": ("QwenImage", {}, QWEN_VAE, 20.43, 512),
    "Z-Image-Turbo": ("ZImage", {}, KL, 6.15, 512),
}  # fmt: skip
"""Name -> class, configurations of transformer and autoencoder, billions of parameters, tokens of text."""
PIPELINES = {
    "SD3": ("StableDiffusion3Pipeline", {"text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer",
            "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer",
            "text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}),
    "Flux": ("FluxPipeline", {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
             "text_encoder_2": "T5EncoderModel", "tokenizer_2": "T5TokenizerFast"}),
    "QwenImage": ("QwenImagePipeline", {"text_encoder": "Qwen2_5_VLForConditionalGeneration",
                  "tokenizer": "Qwen2Tokenizer"}),
    "ZImage": ("ZImagePipeline", {"text_encoder": "Qwen3Model", "tokenizer": "Qwen2Tokenizer"}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_a_published_model_is_read_and_has_its_size(tmp_path: Path, name: str) -> None:
    import diffusers

    family, transformer, vae, billions, tokens = MODELS[name]
    kind = getattr(diffusers, f"{family}Transformer2DModel")
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(**transformer).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=1e-9 if family == "Flux" else 5e-3)

    pipeline, texts = PIPELINES[family]
    autoencoder = "AutoencoderKLQwenImage" if family == "QwenImage" else "AutoencoderKL"
    configs = {
        "transformer": {"_class_name": kind.__name__, **transformer}, "vae": {"_class_name": autoencoder, **vae},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0,
                      "use_dynamic_shifting": name == "FLUX.1-dev"},
    }  # fmt: skip
    index = {"_class_name": pipeline} | {part: ["diffusers", made["_class_name"]] for part, made in configs.items()}
    for part in texts:
        (tmp_path / part).mkdir()
    for part, made in configs.items():
        (tmp_path / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (tmp_path / part / file).write_text(json.dumps(made))
    index |= {part: ["transformers", of] for part, of in texts.items()}
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    geometry = read_geometry(LatentModelSettings(model=str(tmp_path)))
    assert (geometry.picture_size, geometry.latent_shape) == ((1024, 1024), (16, 128, 128))
    assert geometry.text_shape[0] == tokens
    assert geometry.sizes.multiple == 16
    assert len(geometry.at(832, 1216).schedule(28)) == 28
