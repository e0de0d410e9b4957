"""Random-weight pipelines of rectified flows, of the published classes and a few thousand numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_stable_diffusion import WORDS, tokenizer

WIDTH = 32
"""Of T5's output: what the transformers take as text."""


def t5_tokenizer(length: int = 512) -> Any:
    """`WORDS` as whole pieces, everything else in letters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(chr(c), -5.0) for c in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(words: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
                 feed_forward_proj="gated-gelu", initializer_factor=1.0)
    )  # fmt: skip


def clip(words: Any, width: int, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=words.model_max_length, projection_dim=width,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        initializer_factor=5.0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def autoencoder() -> Any:
    """16 channels at half the side; 16 x 16 pictures."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, scaling_factor=1.5,
        shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def enliven(transformer: Any, size: float = 0.3) -> Any:
    """Not the output of nought that some start with: a velocity that bends with latent, time and text."""
    torch.nn.init.normal_(transformer.proj_out.weight, std=size / transformer.proj_out.weight.shape[1] ** 0.5)
    for name, weight in transformer.named_parameters():
        if name.endswith("linear.weight"):  # what time and pooled text modulate
            torch.nn.init.normal_(weight, std=0.3 / weight.shape[1] ** 0.5)
    return transformer


def sd3(*, t5_there: bool = True, scheduler: dict[str, Any] | None = None, **options: Any) -> Any:
    """SD3; `options` of `SD3Transformer2DModel` make it SD3.5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second, third = tokenizer(16), tokenizer(16, pad="!"), t5_tokenizer()
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": WIDTH, "caption_projection_dim": 32,
        "pooled_projection_dim": 32, "pos_embed_max_size": 12,
    }  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=enliven(SD3Transformer2DModel(**config | options)),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | (scheduler or {})), vae=autoencoder(),
        text_encoder=clip(first, 16, projected=True), tokenizer=first,
        text_encoder_2=clip(second, 16, projected=True), tokenizer_2=second,
        text_encoder_3=t5(third) if t5_there else None, tokenizer_3=third if t5_there else None,
    )  # fmt: skip


def flux(*, guidance_embeds: bool = True, scheduler: dict[str, Any] | None = None) -> Any:
    """FLUX.1-dev, or schnell without `guidance_embeds`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    first, second = tokenizer(16), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    return FluxPipeline(
        transformer=enliven(transformer), scheduler=FlowMatchEulerDiscreteScheduler(**shift | (scheduler or {})),
        vae=autoencoder(), text_encoder=clip(first, 16, projected=False), tokenizer=first, text_encoder_2=t5(second),
        tokenizer_2=second,
    )  # fmt: skip


def chroma() -> Any:
    """Chroma, on a scheduler with the beta distribution's sigmas, which its makers advise."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    words = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=2,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.distilled_guidance_layer.out_proj.weight, std=0.3)  # what time modulates
    return ChromaPipeline(
        transformer=enliven(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True),
        vae=autoencoder(), text_encoder=t5(words), tokenizer=words,
    )  # fmt: skip


def qwen_tokenizer() -> Any:
    """Bytes as tokens, and a chat template of the kind that Qwen's have."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab=vocab | {"<|endoftext|>": len(vocab)}, merges=[])
    made.chat_template = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{{ '<t>' if enable_thinking }}"
    return made


LANGUAGE = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.5,
}  # fmt: skip


def qwen_image() -> Any:
    """Qwen-Image: 16 channels of a video autoencoder, at an eighth of the side."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    text = {**LANGUAGE, "vocab_size": len(words), "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=torch.randn(16, generator=generator).tolist(),
        latents_std=(1 + torch.rand(16, generator=generator)).tolist(),
    )  # fmt: skip
    shift = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(
        transformer=enliven(transformer), scheduler=shift, vae=vae, tokenizer=words,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
    )  # fmt: skip


def qwen_image_21(*, sample_sigmas: list[float] | None = None) -> Any:
    """Qwen-Image-2.1: 8 channels of an autoencoder with alpha, at a sixteenth of the side; -Turbo with sigmas of its
    own. A processor that reads text alike stands for Qwen3-VL's, which asks for torchvision."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import CLIPImageProcessor, LlavaProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    words = qwen_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=4, context_in_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    torch.nn.init.normal_(transformer.modulation[1].weight, std=0.3)  # what time modulates
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=torch.randn(8, generator=generator).tolist(),
        latents_std=(1 + torch.rand(8, generator=generator)).tolist(),
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    text = {**LANGUAGE, "vocab_size": len(words), "head_dim": 8,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}  # fmt: skip
    return QwenImage21Pipeline(
        transformer=enliven(transformer), vae=vae, sample_sigmas=sample_sigmas,
        scheduler=FlowMatchEulerDiscreteScheduler(**{} if sample_sigmas else shift),
        text_encoder=Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)),
        processor=LlavaProcessor(CLIPImageProcessor(), words, chat_template=template, patch_size=14),
    )  # fmt: skip


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    words = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4], axes_lens=[1024, 512, 512],
    )  # fmt: skip
    with torch.no_grad():
        for layer in transformer.all_final_layer.values():
            layer.linear.weight *= 0.2  # as gently bent as the others
    return ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(),
        tokenizer=words, text_encoder=Qwen3Model(Qwen3Config(**LANGUAGE, vocab_size=len(words), head_dim=8)),
    )  # fmt: skip


def ovis_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    words = qwen_tokenizer()
    transformer = OvisImageTransformer2DModel(
        in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    torch.nn.init.normal_(transformer.transformer_blocks[0].attn.add_v_proj.weight)  # what the text says
    return OvisImagePipeline(
        transformer=enliven(transformer), vae=autoencoder(), tokenizer=words,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=Qwen3Model(Qwen3Config(**LANGUAGE, vocab_size=len(words), head_dim=8)),
    )  # fmt: skip


def flux2_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    """Transformer, scheduler and autoencoder of FLUX.2: 4 channels at half the side, 16 in squares."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=3 * WIDTH, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, layers_per_block=1,
    )  # fmt: skip
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.nn.init.normal_(transformer.transformer_blocks[0].attn.add_v_proj.weight)  # what the text says
    return {"transformer": enliven(transformer), "scheduler": scheduler, "vae": vae}


def flux2() -> Any:
    """FLUX.2-dev: the language model's layers 10, 20 and 30, its prompts behind a system message. A tokenizer stands
    for the `PixtralProcessor`, which asks for torchvision."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    words = qwen_tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{{ part['text'] if m['role'] == 'user' else part['text'][:4] }}{% endfor %}{% endfor %}"
    )
    text = {**LANGUAGE, "model_type": "mistral", "vocab_size": len(words), "num_hidden_layers": 30, "head_dim": 8}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    return Flux2Pipeline(
        **flux2_parts(guidance_embeds=True),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=words,
    )  # fmt: skip


def flux2_klein(*, is_distilled: bool) -> Any:
    """FLUX.2-klein, or its base model: the language model's layers 9, 18 and 27."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = qwen_tokenizer()
    text = Qwen3Config(**{**LANGUAGE, "num_hidden_layers": 27}, vocab_size=len(words), head_dim=8)
    return Flux2KleinPipeline(
        **flux2_parts(guidance_embeds=False), text_encoder=Qwen3ForCausalLM(text), tokenizer=words,
        is_distilled=is_distilled,
    )  # fmt: skip


SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
"""What makes SD3.5-medium of SD3; -large has no dual attention."""
KINDS: dict[str, Any] = {
    "sd3": sd3,
    "sd3-without-t5": lambda: sd3(t5_there=False),
    "sd35-medium": lambda: sd3(**SD35),
    "sd35-large": lambda: sd3(qk_norm="rms_norm"),
    "flux-dev": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "chroma": chroma,
    "flux2-dev": flux2,
    "flux2-klein": lambda: flux2_klein(is_distilled=True),
    "flux2-klein-base": lambda: flux2_klein(is_distilled=False),
    "qwen-image": qwen_image,
    "qwen-image-21": qwen_image_21,
    "qwen-image-21-turbo": lambda: qwen_image_21(sample_sigmas=[1.0, 0.97, 0.8, 0.4]),
    "z-image": z_image,
    "ovis-image": ovis_image,
}


def build(folder: Path | str, kind: str, seed: int = 0) -> str:
    """Write a pipeline's folder."""
    torch.manual_seed(seed)
    KINDS[kind]().save_pretrained(folder)
    return str(folder)
