"""Ovis-Image: a language model's tokens as text at positions of their own, latents packed two by two, two prompts.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stages.models.captions import Reader
from stages.models.flux import image_ids
from stages.models.latent import Condition
from stages.models.transformer import PackedTransformer, pack, unpack


class OvisImage(PackedTransformer):
    """Ovis-Image (Wang et al., 2025); text that is padding is nought, and has its say in the network."""

    index = "OvisImagePipeline"
    transformer_class = "OvisImageTransformer2DModel"
    encoders = {"text_encoder": "tokenizer"}
    tokens = most_tokens = 256

    @property
    def readers(self) -> tuple[Reader, ...]:
        return (Reader(self._read, self.length, "text_encoder"),)

    def _read(self, prompt: str, verbose: bool = True) -> dict[str, list[int]]:
        """The tokens that are kept: without the beginning of the instruction, with its end and the template's."""
        (text,) = self.pipeline._get_messages(prompt)
        ids = self.pipeline.tokenizer(text, add_special_tokens=False, verbose=verbose)["input_ids"]
        return {"input_ids": ids[self.pipeline.user_prompt_begin_id :]}

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        text_BLE, null_BLE, _, _ = self.pipeline.encode_prompt(
            list(prompts), [negative or ""] * len(prompts), guided, device=self.reads_on,
            max_sequence_length=self.length,
        )  # fmt: skip
        return {"text_BLE": text_BLE} | ({"null_text_BLE": null_BLE} if guided else {})

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        """See `FlowTransformer`; the time is rounded to the network's type, as the pipeline rounds it."""
        dtype, (_, _, H, W) = self.dtypes["transformer"], z_BCHW.shape
        text_BLE, like = condition["text_BLE"].to(dtype), {"device": z_BCHW.device, "dtype": dtype}
        steps_L3 = torch.arange(text_BLE.shape[1], **like)[:, None] * torch.tensor([0, 1, 1], **like)
        tokens_BNC = (network or self.transformer)(
            hidden_states=pack(z_BCHW).to(dtype), timestep=t_B.to(dtype) / 1000, encoder_hidden_states=text_BLE,
            txt_ids=steps_L3, img_ids=image_ids(H // 2, W // 2, **like), return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens_BNC.float(), H, W)
