"""Stable Diffusion 1.5, 2.1 and SDXL as published, but for their weights, which are random; and the configurations of
published rectified flows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd21": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
}
"""Sizes of the published checkpoints' parts."""

DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}

SD3: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
FLUX = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096}
KL = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
FLUX2: dict[str, Any] = {"guidance_embeds": False}
KLEIN_4B = {**FLUX2, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {**FLUX2, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
QWEN_VAE = {"base_dim": 96, "z_dim": 16, "temperal_downsample": [False, True, True]}
FLOWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], float, int]] = {
    "SD3-medium": ("SD3", {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                           "pos_embed_max_size": 192}, KL, 2.03, 333),
    "SD3.5-medium": ("SD3", {**SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                             "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                             "dual_attention_layers": list(range(13))}, KL, 2.24, 333),
    "SD3.5-large": ("SD3", {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                            "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, KL, 8.06, 333),
    "FLUX.1-dev": ("Flux", {**FLUX, "guidance_embeds": True}, KL, 11.901408320, 512),
    "FLUX.1-schnell": ("Flux", FLUX, KL, 11.891178560, 512),
    "Chroma1-HD": ("Chroma", {}, KL, 8.9, 512),
    "FLUX.2-dev": ("Flux2", {}, {}, 32.2, 512),
    "FLUX.2-klein-4B": ("Flux2Klein", KLEIN_4B, {}, 3.88, 512),
    "FLUX.2-klein-9B": ("Flux2Klein", KLEIN_9B, {}, 9.08, 512),
    "Qwen-Image": ("QwenImage", {}, QWEN_VAE, 20.43, 512),
    "Qwen-Image-2.1": ("QwenImage21", {}, {}, 7.115, 512),
    "Ovis-Image-7B": ("OvisImage", {}, KL, 7.37, 256),
    "Z-Image-Turbo": ("ZImage", {}, KL, 6.15, 512),
}  # fmt: skip
"""Name -> family, configurations of transformer and autoencoder, billions of parameters, tokens of text."""
PIPELINES = {
    "SD3": ("StableDiffusion3Pipeline", {"text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer",
            "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer",
            "text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}),
    "Flux": ("FluxPipeline", {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
             "text_encoder_2": "T5EncoderModel", "tokenizer_2": "T5TokenizerFast"}),
    "Chroma": ("ChromaPipeline", {"text_encoder": "T5EncoderModel", "tokenizer": "T5TokenizerFast"}),
    "Flux2": ("Flux2Pipeline", {"text_encoder": "Mistral3ForConditionalGeneration", "tokenizer": "PixtralProcessor"}),
    "Flux2Klein": ("Flux2KleinPipeline", {"text_encoder": "Qwen3ForCausalLM", "tokenizer": "Qwen2Tokenizer"}),
    "QwenImage": ("QwenImagePipeline", {"text_encoder": "Qwen2_5_VLForConditionalGeneration",
                  "tokenizer": "Qwen2Tokenizer"}),
    "QwenImage21": ("QwenImage21Pipeline", {"text_encoder": "Qwen3VLForConditionalGeneration",
                    "processor": "Qwen3VLProcessor"}),
    "OvisImage": ("OvisImagePipeline", {"text_encoder": "Qwen3Model", "tokenizer": "Qwen2Tokenizer"}),
    "ZImage": ("ZImagePipeline", {"text_encoder": "Qwen3Model", "tokenizer": "Qwen2Tokenizer"}),
}  # fmt: skip


def makers(kind: str, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """What makes each network of ``sd15``, ``sd21`` or ``sdxl``, with weights as its class draws them.

    Args:
        tokenizer: A CLIP tokenizer with no more words than CLIP's; the published vocabulary is not needed.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(sizes: dict[str, int], act: str, projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            **sizes, vocab_size=49408, max_position_embeddings=77, hidden_act=act, projection_dim=projection,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    def autoencoder() -> torch.nn.Module:
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
            sample_size=1024 if kind == "sdxl" else 512, scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
            force_upcast=True,
        )  # fmt: skip

    made: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**UNETS[kind]),
        "vae": autoencoder,
        "text_encoder": lambda: CLIPTextModel(
            text(CLIP_H, "gelu", 512) if kind == "sd21" else text(CLIP_L, "quick_gelu", 768)
        ),
    }
    if kind == "sdxl":
        made["text_encoder_2"] = lambda: CLIPTextModelWithProjection(text(CLIP_G, "gelu", 1280))
    return made


def build(kind: str, folder: Path, tokenizer: Any) -> dict[str, int]:
    """Write the folder ``sd15``, ``sd21`` or ``sdxl`` part by part (float32, one part in memory at a time).

    Args:
        kind: Which.
        folder: Where.
        tokenizer: See `makers`.

    Returns:
        Parameters a part.
    """
    torch.manual_seed(0)
    sizes = {}
    for part, make in makers(kind, tokenizer).items():
        model = make()
        sizes[part] = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder / part)
        del model
    write_rest(kind, folder, tokenizer)
    return sizes


def write_configs(kind: str, folder: Path, tokenizer: Any) -> None:
    """Write the folder without its weights: seconds, and a few kilobytes."""
    for part, make in makers(kind, tokenizer).items():
        with torch.device("meta"):
            model = make()
        (model.config.save_pretrained if part.startswith("text") else model.save_config)(folder / part)
    write_rest(kind, folder, tokenizer)


def write_rest(kind: str, folder: Path, tokenizer: Any) -> None:
    """Write scheduler, tokenizers and index."""
    from diffusers import DDIMScheduler

    prediction = "v_prediction" if kind == "sd21" else "epsilon"
    DDIMScheduler(**DIFFUSION, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction).save_pretrained(
        folder / "scheduler"
    )
    for part in ("tokenizer", "tokenizer_2") if kind == "sdxl" else ("tokenizer",):
        tokenizer.save_pretrained(folder / part)
    write_index(kind, folder)


def write_index(kind: str, folder: Path) -> None:
    """``model_index.json`` as diffusers writes it."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if kind == "sdxl":
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def classes(family: str) -> tuple[str, str]:
    """Of transformer and autoencoder."""
    of = "Flux2" if family == "Flux2Klein" else family
    autoencoders = {
        "QwenImage": "AutoencoderKLQwenImage",
        "QwenImage21": "AutoencoderKLQwenImage21",
        "Flux2": "AutoencoderKLFlux2",
    }
    return f"{of}Transformer2DModel", autoencoders.get(of, "AutoencoderKL")


def write_flow_configs(name: str, folder: Path) -> None:
    """Write the configurations of one of `FLOWS`: no weights, no tokenizers."""
    family, transformer, vae, _, _ = FLOWS[name]
    pipeline, texts = PIPELINES[family]
    transformer_class, vae_class = classes(family)
    configs = {
        "transformer": {"_class_name": transformer_class, **transformer},
        "vae": {"_class_name": vae_class, **vae},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0,
                      "use_dynamic_shifting": name == "FLUX.1-dev"},
    }  # fmt: skip
    index = {"_class_name": pipeline} | {part: ["diffusers", made["_class_name"]] for part, made in configs.items()}
    for part in (*texts, *configs):
        (folder / part).mkdir(parents=True)
    for part, made in configs.items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(made))
    index |= {part: ["transformers", of] for part, of in texts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
