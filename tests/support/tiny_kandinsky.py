"""Random-weight Kandinsky 2.2 folders of a few thousand numbers, and a reference to go with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from tests.support.tiny_stable_diffusion import tokenizer

WIDTH = 24
LENGTH = 16


def build_prior(folder: Path | str, seed: int = 0) -> str:
    """A prior pipeline: 32x32 pictures of 16 patches, embeddings of 24 numbers."""
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(seed)
    words = tokenizer(LENGTH)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, initializer_factor=5.0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=WIDTH, initializer_range=0.3,
    )  # fmt: skip
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH, num_embeddings=LENGTH
    )
    torch.nn.init.normal_(prior.clip_std)
    torch.nn.init.normal_(prior.clip_mean)
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    KandinskyV22PriorPipeline(
        prior=prior, image_encoder=CLIPVisionModelWithProjection(vision), tokenizer=words,
        text_encoder=CLIPTextModelWithProjection(text), scheduler=scheduler, image_processor=processor,
    ).save_pretrained(str(folder))  # fmt: skip
    return str(folder)


def build_decoder(folder: Path | str, seed: int = 0, width: int = WIDTH) -> str:
    """A decoder pipeline: 16x16 pictures, 4x8x8 latents."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(32,), layers_per_block=1,
        cross_attention_dim=16, down_block_types=("SimpleCrossAttnDownBlock2D",),
        up_block_types=("SimpleCrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=width, encoder_hid_dim_type="image_proj",
        addition_embed_type="image", attention_head_dim=8, norm_num_groups=8, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = VQModel(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), layers_per_block=1, vq_embed_dim=4,
        norm_type="spatial",
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, thresholding=False)
    KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(str(folder))
    return str(folder)


def build_reference(folder: Path | str, prior: str, rows: int = 300, seed: int = 0) -> str:
    """A reference of random embeddings with a covariance, made with the image encoder of a prior pipeline."""
    import pyarrow as pa

    from index import gaussian, neighbours
    from pipeline.storage import checksum
    from stages.models import clip

    folder = Path(folder) / "reference"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    vectors_NE = (rng.normal(size=(rows, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) / 4 + 0.5).astype(np.float32)
    np.save(folder / "vectors.npy", vectors_NE)
    table = pa.table({"id": [f"image{i}" for i in range(rows)], "part": [0] * rows, "row": list(range(rows))})
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    statistics = gaussian.moments(vectors_NE)
    gaussian.save(folder / "gaussian", statistics, gaussian.fit(statistics), {})
    neighbours.build(np.load(folder / "vectors.npy", mmap_mode="r"), [rows], folder, neighbours.Plan(), {})
    with (folder / "vectors.npy").open("rb") as file:
        made_of = checksum(file)
    facts = {"encoder": clip.identity(prior, "image"), "rows": rows, "dim": WIDTH, "vectors": made_of}
    (folder / "reference.json").write_text(json.dumps(facts))
    return str(folder.parent)
