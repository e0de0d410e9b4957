"""Random-weight Stable Diffusion folders of a few thousand numbers, for tests in which meaning does not matter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

WORDS = ["photo", "of", "a", "star", "circle", "heart", "robot", "that", "is", "red", "blue", "green", "striped"]
WORDS += ["dotted", "plain", "small", "large", "frozen", "melted", "in", "ice", "left", "right", "cold", "warm", "ring"]
WORDS += ["thing"]


def tokenizer(length: int = 16, pad: str = "<|endoftext|>"):
    """A CLIP tokenizer that holds `WORDS` as single tokens and splits everything else into letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocab = [*letters, *(c + "</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted(WORDS):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            # Follow the merges there are, as the tokenizer will; only then add one.
            known = [(merges.index(pair), i) for i, pair in enumerate(pairwise(pieces)) if pair in merges]
            at = min(known)[1] if known else 0
            pair = (pieces[at], pieces[at + 1])
            if pair not in merges:
                merges.append(pair)
            joined = "".join(pair)
            if joined not in vocab:
                vocab.append(joined)
            pieces[at : at + 2] = [joined]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(vocab)}, merges=merges, model_max_length=length, pad_token=pad
    )


def build(folder: Path | str, kind: str = "sd", *, prediction: str = "epsilon", seed: int = 0, length: int = 16,
          **unet_options: Any) -> str:  # fmt: skip
    """Write a Stable Diffusion (``sd``) or SDXL (``sdxl``) folder: 16x16 pictures, 4x8x8 latents, widths 32 and 24."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    words = tokenizer(length)

    def text(width: int, projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            projection_dim=projection,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            initializer_factor=5.0,
        )

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 20,
        }
        if kind == "sdxl"
        else {}
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if kind == "sd" else 32 + 24,
        attention_head_dim=4,
        **extra,
        **unet_options,
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": scheduler,
        "tokenizer": words,
        "text_encoder": CLIPTextModel(text(32, 32)),
    }
    if kind == "sd":
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
        )
    else:
        second = CLIPTextModelWithProjection(text(24, 20))
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer(length, pad="!"))
    pipe.save_pretrained(folder)
    return str(folder)
