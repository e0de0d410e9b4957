"""A Stable Diffusion folder as the checkpoint of one file that its authors' own code would have written.

Names after CompVis' `latent-diffusion` (`openaimodel.py`, `model.py`): what a block is called follows from its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _renamed(state: dict[str, torch.Tensor], old: str, new: str, names: dict[str, str] | None = None) -> dict[str, Any]:
    """What lies below one name, below another; with parts renamed."""
    found = {}
    for key, value in state.items():
        if not key.startswith(f"{old}."):
            continue
        rest = key.removeprefix(f"{old}.")
        for mine, theirs in (names or {}).items():
            if rest.startswith(f"{mine}."):
                rest = theirs + rest.removeprefix(mine)
                break
        found[f"{new}.{rest}"] = value
    return found


def unet(network: Any) -> dict[str, torch.Tensor]:
    state, config = network.state_dict(), network.config
    made = _renamed(state, "time_embedding", "time_embed", {"linear_1": "0", "linear_2": "2"})
    made |= _renamed(state, "add_embedding", "label_emb.0", {"linear_1": "0", "linear_2": "2"})
    made |= _renamed(state, "conv_in", "input_blocks.0.0")
    made |= _renamed(state, "conv_norm_out", "out.0") | _renamed(state, "conv_out", "out.2")
    number = 1
    for block in range(len(config.down_block_types)):
        for layer in range(config.layers_per_block):
            place = f"input_blocks.{number}"
            made |= _renamed(state, f"down_blocks.{block}.resnets.{layer}", f"{place}.0", RESNET)
            made |= _renamed(state, f"down_blocks.{block}.attentions.{layer}", f"{place}.1")
            number += 1
        down = _renamed(state, f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{number}.0.op")
        made |= down
        number += bool(down)
    for old, new in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
        made |= _renamed(state, f"mid_block.{old}", f"middle_block.{new}", RESNET if "resnets" in old else None)
    number = 0
    for block in range(len(config.up_block_types)):
        for layer in range(config.layers_per_block + 1):
            place = f"output_blocks.{number}"
            made |= _renamed(state, f"up_blocks.{block}.resnets.{layer}", f"{place}.0", RESNET)
            attention = _renamed(state, f"up_blocks.{block}.attentions.{layer}", f"{place}.1")
            made |= attention
            if layer == config.layers_per_block:
                after = 2 if attention else 1
                made |= _renamed(state, f"up_blocks.{block}.upsamplers.0.conv", f"{place}.{after}.conv")
            number += 1
    return made


def vae(network: Any) -> dict[str, torch.Tensor]:
    state, blocks = network.state_dict(), len(network.config.block_out_channels)
    made = _renamed(state, "quant_conv", "quant_conv") | _renamed(state, "post_quant_conv", "post_quant_conv")
    short = {"conv_shortcut": "nin_shortcut"}
    for side, kind, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for old, new in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_norm_out", "norm_out")):
            made |= _renamed(state, f"{side}.{old}", f"{side}.{new}")
        for layer in (0, 1):
            made |= _renamed(state, f"{side}.mid_block.resnets.{layer}", f"{side}.mid.block_{layer + 1}", short)
        attention = _renamed(state, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", ATTENTION)
        made |= {  # theirs are convolutions
            key: value[:, :, None, None] if value.ndim == 2 else value for key, value in attention.items()
        }
        for block in range(blocks):
            theirs = block if kind == "down" else blocks - 1 - block
            for layer in range(network.config.layers_per_block + (kind == "up")):
                old = f"{side}.{kind}_blocks.{block}.resnets.{layer}"
                made |= _renamed(state, old, f"{side}.{kind}.{theirs}.block.{layer}", short)
            old = f"{side}.{kind}_blocks.{block}.{sampler}rs.0.conv"
            made |= _renamed(state, old, f"{side}.{kind}.{theirs}.{sampler}.conv")
    return made


def clip(network: Any) -> dict[str, torch.Tensor]:
    """As transformers named CLIP's text encoder then."""
    return {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in network.state_dict().items()
    }


def open_clip(network: Any) -> dict[str, torch.Tensor]:
    """As OpenCLIP names a text encoder with a projection: the three projections of an attention are one matrix."""
    state = clip(network)
    made = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": network.text_projection.weight.detach().T,
    }
    made |= _renamed(state, "text_model.final_layer_norm", "ln_final")
    for layer in range(network.config.num_hidden_layers):
        old, new = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                 "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
        for mine, theirs in names.items():
            made |= _renamed(state, f"{old}.{mine}", f"{new}.{theirs}")
        for kind in ("weight", "bias"):
            parts = [state[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            made[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
    return made


def write(folder: str, file: Path, kind: str = "sd", leave_out: str = "") -> str:
    """Write a folder's networks as one checkpoint, but for those whose names begin with `leave_out`."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors.torch import save_file

    if kind == "sd":
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        texts = {"cond_stage_model.transformer": clip(pipe.text_encoder)}
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        texts = {"conditioner.embedders.0.transformer": clip(pipe.text_encoder),
                 "conditioner.embedders.1.model": open_clip(pipe.text_encoder_2)}  # fmt: skip
    parts = {"model.diffusion_model": unet(pipe.unet), "first_stage_model": vae(pipe.vae), **texts}
    assert len(parts["model.diffusion_model"]) == len(pipe.unet.state_dict())
    assert len(parts["first_stage_model"]) == len(pipe.vae.state_dict())
    state = {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in part.items()}
    chosen = {key: value.contiguous() for key, value in state.items() if not leave_out or not key.startswith(leave_out)}
    save_file(chosen, file, metadata={"format": "pt"})
    return str(file)
