"""Random-weight folders of decoders of image embeddings: Stable unCLIP, and IP-Adapters."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.tiny_stable_diffusion import tokenizer

WIDTH = 24
TOKENS = 4
"""Of an IP-Adapter."""


def build_unclip(folder: Path, seed: int = 0) -> str:
    """Stable unCLIP's architecture (2.1: a class embedding of embedding and noise level): 16x16 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(seed)
    words = tokenizer(16)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=WIDTH,
    )  # fmt: skip
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=WIDTH)
    torch.nn.init.normal_(normalizer.mean)
    torch.nn.init.uniform_(normalizer.std, 0.5, 2.0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4), class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH,
        use_linear_projection=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(), image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=normalizer, image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=words, text_encoder=CLIPTextModel(text), unet=unet, scheduler=DDIMScheduler(), vae=vae,
    ).save_pretrained(str(folder))  # fmt: skip
    return str(folder)


def build_ip_adapter(file: Path, model: str, seed: int = 0, width: int = WIDTH, plus: bool = False) -> str:
    """The weights of an IP-Adapter for a folder's U-Net, under the published names: of the plain kind, or a Plus with
    its four layers of one head."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    cross = unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.randn(TOKENS * cross, width, generator=draw),
        "image_proj.proj.bias": torch.randn(TOKENS * cross, generator=draw),
        "image_proj.norm.weight": torch.ones(cross),
        "image_proj.norm.bias": torch.zeros(cross),
    }
    if plus:
        weights = {f"image_proj.{name}": value for name, value in _resampler(cross, width, draw).items()}
    parameters = dict(unet.named_parameters())
    # Published files count the U-Net's attention processors: the odd ones attend to the prompt.
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            wide = parameters[name.removesuffix(".processor") + ".to_k.weight"].shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{number}.{part}.weight"] = torch.randn(wide, cross, generator=draw)
    save_file(weights, str(file))
    return str(file)


def _resampler(cross: int, width: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """An IP-Adapter Plus' network from hidden states to tokens of the prompt's width: 64 numbers wide."""
    wide = 64
    norms = {f"{name}.weight": torch.ones(size) for name, size in {"norm_out": cross}.items()}
    sizes = {"proj_in": (wide, width), "proj_out": (cross, wide)}
    for layer in range(4):
        own = f"layers.{layer}"
        sizes |= {f"{own}.0.to_q": (wide, wide), f"{own}.0.to_kv": (2 * wide, wide), f"{own}.0.to_out": (wide, wide)}
        sizes |= {f"{own}.1.1": (4 * wide, wide), f"{own}.1.3": (wide, 4 * wide)}
        for name in ("0.norm1", "0.norm2", "1.0"):
            norms |= {f"{own}.{name}.weight": torch.ones(wide)}
    biases = {name.replace("weight", "bias"): torch.zeros_like(value) for name, value in norms.items()}
    biases |= {f"{name}.bias": torch.zeros(sizes[name][0]) for name in ("proj_in", "proj_out")}
    drawn = {f"{name}.weight": torch.randn(size, generator=draw) / size[1] ** 0.5 for name, size in sizes.items()}
    return {"latents": torch.randn(1, TOKENS, wide, generator=draw), **drawn, **norms, **biases}


def build_cascade(folder: Path, seed: int = 0) -> tuple[str, str]:
    """Stable Cascade's decoder and prior: 32x32 pictures (asked for as such), from latents of 1x1."""
    from diffusers import (
        DDPMWuerstchenScheduler,
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
        StableCascadeUNet,
    )
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    words = tokenizer(16)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=32, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    prior = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=32, block_out_channels=(32, 32), num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), switch_level=(False,),
        clip_image_in_channels=WIDTH, clip_text_in_channels=32, clip_text_pooled_in_channels=32,
        block_types_per_layer=(blocks, blocks), dropout=(0.1, 0.1),
    )  # fmt: skip
    decoder = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=32, block_out_channels=(16, 32), num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), patch_size=2,
        block_types_per_layer=(blocks[:2], blocks), clip_text_pooled_in_channels=32, effnet_in_channels=4,
        pixel_mapper_in_channels=3, kernel_size=3, dropout=(0.1, 0.1), self_attn=True,
    )  # fmt: skip
    for network in (prior, decoder):  # made with zeros at the end, it would say nothing of what it is given
        for name, weight in network.named_parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1 if "clf" in name else 0.02)
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16)
    shared = {"tokenizer": words, "text_encoder": CLIPTextModelWithProjection(text)}
    StableCascadeDecoderPipeline(
        decoder=decoder.eval(), vqgan=vqgan.eval(), scheduler=DDPMWuerstchenScheduler(), latent_dim_scale=8.0, **shared
    ).save_pretrained(str(folder / "decoder"))
    StableCascadePriorPipeline(
        prior=prior.eval(), scheduler=DDPMWuerstchenScheduler(), resolution_multiple=16.0, **shared
    ).save_pretrained(str(folder / "prior"))
    return str(folder / "decoder"), str(folder / "prior")
