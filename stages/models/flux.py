"""FLUX.1: CLIP's pooled text and a T5's tokens, latents packed two by two, guidance told to the network.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from stages.models.latent import Condition, Predict
from stages.models.transformer import PackedTransformer, pack, unpack


class Flux(PackedTransformer):
    """FLUX.1-dev, whose guidance is an input of the network, and FLUX.1-schnell, which has none (Black Forest Labs,
    2024)."""

    index = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    left_out = {"image_encoder": None, "feature_extractor": None}

    @classmethod
    def guiding(cls, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> Literal["told", "none"]:
        return "told" if transformer["guidance_embeds"] else "none"

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        """The network is told the guidance: there is no negative side."""
        self.geometry.check_guidance(1.0, negative)
        text_BLE, pooled_BE, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.reads_on, max_sequence_length=self.length
        )
        return {"text_BLE": text_BLE, "pooled_BE": pooled_BE}

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None,
        guidance: float = 1.0,
    ) -> torch.Tensor:  # fmt: skip
        """See `FlowTransformer`; the time is rounded to the network's type, as the pipeline rounds it."""
        dtype, (_, _, H, W) = self.dtypes["transformer"], z_BCHW.shape
        text_BLE = condition["text_BLE"].to(dtype)
        like = {"device": z_BCHW.device, "dtype": dtype}
        told = None
        if self.geometry.guiding == "told":
            told = torch.full((len(z_BCHW),), guidance, device=z_BCHW.device)
        tokens_BNC = (network or self.transformer)(
            hidden_states=pack(z_BCHW).to(dtype), timestep=t_B.to(dtype) / 1000, guidance=told,
            pooled_projections=condition["pooled_BE"].to(dtype), encoder_hidden_states=text_BLE,
            txt_ids=torch.zeros(text_BLE.shape[1], 3, **like), img_ids=image_ids(H // 2, W // 2, **like),
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens_BNC.float(), H, W)

    def predictor(self, guidance: float = 1.0) -> Predict:
        self.geometry.check_guidance(guidance, None)
        return self.in_parts(guidance=guidance)


def image_ids(height: int, width: int, **like: Any) -> torch.Tensor:
    """(N, 3): zero, row and column of each token; made where they are needed, `like` saying device and type."""
    sides = (torch.arange(side, **like) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
