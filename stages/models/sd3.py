"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, classifier-free guidance.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stages.models.flow_schedule import FlowGrid
from stages.models.latent import Condition, Sizes
from stages.models.transformer import FlowTransformer


class StableDiffusion3(FlowTransformer):
    """SD3-medium, SD3.5-medium and -large (Esser et al., 2024): the text is CLIP's 77 tokens with T5's behind them."""

    index = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
    optional = frozenset({"text_encoder_3"})
    left_out = {"image_encoder": None, "feature_extractor": None}
    grid = FlowGrid(linear=None)
    tokens = 256

    @classmethod
    def sizes(cls, path: str, transformer: Mapping[str, Any], factor: int) -> Sizes:
        """Sides are bounded by the table of positions, which is cut to the picture."""
        patch = int(transformer["patch_size"])
        largest = int(transformer["pos_embed_max_size"]) * patch * factor
        return Sizes(path, factor, factor * patch, largest=largest)

    @classmethod
    def default_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], factor: int) -> int:
        return int(transformer["sample_size"]) * factor

    @classmethod
    def text_shape(cls, transformer: Mapping[str, Any], tokens: int) -> tuple[int, int]:
        return 77 + tokens, int(transformer["joint_attention_dim"])

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        text_BLE, null_BLE, pooled_BE, null_pooled_BE = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, prompt_3=None, device=self.reads_on,
            do_classifier_free_guidance=guided,
            negative_prompt=None if negative is None else [negative] * len(prompts), max_sequence_length=self.length,
        )  # fmt: skip
        nulls = {"null_text_BLE": null_BLE, "null_pooled_BE": null_pooled_BE} if guided else {}
        return {"text_BLE": text_BLE, "pooled_BE": pooled_BE, **nulls}

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        dtype = self.dtypes["transformer"]
        v_BCHW: torch.Tensor = (network or self.transformer)(
            hidden_states=z_BCHW.to(dtype), timestep=t_B, encoder_hidden_states=condition["text_BLE"].to(dtype),
            pooled_projections=condition["pooled_BE"].to(dtype), return_dict=False,
        )[0]  # fmt: skip
        return v_BCHW.float()
