"""Chroma: FLUX.1 without CLIP and without guidance that is told: a T5's tokens, and two prompts to be guided by.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stages.models.flux import image_ids
from stages.models.latent import Condition
from stages.models.transformer import PackedTransformer, pack, unpack


class Chroma(PackedTransformer):
    """Chroma1-HD, -Base and their relatives (Lodestone Rock, 2025)."""

    index = "ChromaPipeline"
    transformer_class = "ChromaTransformer2DModel"
    encoders = {"text_encoder": "tokenizer"}
    recordable = False  # it makes a table on the host in each pass
    left_out = {"image_encoder": None, "feature_extractor": None}

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        """The mask is of the text and of one token of padding behind it."""
        text_BLE, _, mask_BL, null_BLE, _, null_mask_BL = self.pipeline.encode_prompt(
            list(prompts), [negative or ""] * len(prompts), device=self.reads_on, do_classifier_free_guidance=guided,
            max_sequence_length=self.length,
        )  # fmt: skip
        nulls = {"null_text_BLE": null_BLE, "null_mask_BL": null_mask_BL.bool()} if guided else {}
        return {"text_BLE": text_BLE, "mask_BL": mask_BL.bool(), **nulls}

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        """See `FlowTransformer`; the time is rounded to the network's type, as the pipeline rounds it. So is the mask:
        attention adds its ones and noughts to the scores (it leaves nothing out), and the pipeline's pictures, which
        are the law here, are made so."""
        dtype, (B, _, H, W) = self.dtypes["transformer"], z_BCHW.shape
        text_BLE, mask_BL = condition["text_BLE"].to(dtype), condition["mask_BL"].to(dtype)
        like = {"device": z_BCHW.device, "dtype": dtype}
        tokens_BNC = (network or self.transformer)(
            hidden_states=pack(z_BCHW).to(dtype), timestep=t_B.to(dtype) / 1000, encoder_hidden_states=text_BLE,
            txt_ids=torch.zeros(text_BLE.shape[1], 3, **like), img_ids=image_ids(H // 2, W // 2, **like),
            attention_mask=torch.cat([mask_BL, torch.ones(B, H * W // 4, **like)], 1), return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens_BNC.float(), H, W)
