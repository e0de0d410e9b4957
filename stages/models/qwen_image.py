"""Qwen-Image: a language model's tokens as text, latents of a video autoencoder packed two by two, guidance rescaled.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stages.models.captions import Reader
from stages.models.guidance import classifier_free
from stages.models.latent import Combine, Condition
from stages.models.transformer import PackedTransformer, pack, padded, unpack, unpadded


class QwenImage(PackedTransformer):
    """Qwen-Image (Wu et al., 2025)."""

    index = "QwenImagePipeline"
    transformer_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    encoders = {"text_encoder": "tokenizer"}
    most_tokens = 1024

    @staticmethod
    def guidance_options(guidance: float, negative: str | None) -> str:
        """See `stages.models.usage.Usage`: the pipeline guides only where it is given a negative prompt."""
        return f"true_cfg_scale={guidance}" + (f", negative_prompt={negative or ''!r}" if guidance > 1 else "")

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        return int(vae["z_dim"])

    @classmethod
    def factor(cls, vae: Mapping[str, Any]) -> int:
        return int(2 ** len(vae["temperal_downsample"]))

    @classmethod
    def default_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], factor: int) -> int:
        return 128 * factor

    @property
    def readers(self) -> tuple[Reader, ...]:
        return (Reader(self._read, self.length, "text_encoder"),)

    def _read(self, prompt: str, verbose: bool = True) -> dict[str, list[int]]:
        """The tokens that are kept: without the beginning of the template, with its end."""
        text = self.pipeline.prompt_template_encode.format(prompt)
        ids = self.pipeline.tokenizer(text, verbose=verbose)["input_ids"]
        return {"input_ids": ids[self.pipeline.prompt_template_encode_start_idx :]}

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        text_BLE, mask_BL = padded(self._texts(prompts), self.length)
        nulls: Condition = {}
        if guided:
            null_BLE, null_mask_BL = padded(self._texts([negative or ""] * len(prompts)), self.length)
            nulls = {"null_text_BLE": null_BLE, "null_mask_BL": null_mask_BL}
        return {"text_BLE": text_BLE, "mask_BL": mask_BL, **nulls}

    def _texts(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """(L, E) of each prompt, as long as it is."""
        text_BLE, mask_BL = self.pipeline.encode_prompt(
            list(prompts), device=self.reads_on, max_sequence_length=self.length
        )
        return unpadded(text_BLE, mask_BL)

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        """See `FlowTransformer`; the time is rounded to the network's type, as the pipeline rounds it."""
        dtype, (B, _, H, W) = self.dtypes["transformer"], z_BCHW.shape
        tokens_BNC = (network or self.transformer)(
            hidden_states=pack(z_BCHW).to(dtype), timestep=t_B.to(dtype) / 1000,
            encoder_hidden_states=condition["text_BLE"].to(dtype), encoder_hidden_states_mask=condition["mask_BL"],
            img_shapes=[[(1, H // 2, W // 2)]] * B, return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens_BNC.float(), H, W)

    def combination(self, guidance: float) -> Combine:
        return rescaled(guidance)


def rescaled(guidance: float) -> Combine:
    """Classifier-free guidance, each token then made as long as it was under the prompt alone."""
    combine = classifier_free(guidance)

    def rescale(null_BCHW: torch.Tensor, text_BCHW: torch.Tensor) -> torch.Tensor:
        _, _, H, W = text_BCHW.shape
        guided_BNC, text_BNC = pack(combine(null_BCHW, text_BCHW)), pack(text_BCHW)
        length = text_BNC.norm(dim=-1, keepdim=True) / guided_BNC.norm(dim=-1, keepdim=True)
        return unpack(guided_BNC * length, H, W)

    return rescale
