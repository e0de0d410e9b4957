"""Z-Image: a language model's tokens as text, of a length of its own in every row; time and velocity run backwards.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stages.models.captions import Reader
from stages.models.flow_schedule import FlowGrid
from stages.models.latent import Condition, Sizes
from stages.models.transformer import FlowTransformer, padded


class ZImage(FlowTransformer):
    """Z-Image and Z-Image-Turbo (Tongyi-MAI, 2025)."""

    index = "ZImagePipeline"
    transformer_class = "ZImageTransformer2DModel"
    mixed = frozenset({"noise_refiner", "context_refiner"})
    encoders = {"text_encoder": "tokenizer"}
    grid = FlowGrid(linear="float32")
    recordable = False  # texts are as long as they are

    @staticmethod
    def guidance_options(guidance: float, negative: str | None) -> str:
        """See `stages.models.usage.Usage`: the pipeline adds its scale to 1, and guides above 0."""
        said = f", negative_prompt={negative!r}" if negative else ""
        return f"guidance_scale={guidance - 1}{said}"

    @classmethod
    def sizes(cls, path: str, transformer: Mapping[str, Any], factor: int) -> Sizes:
        """Sides are bounded by the tables of positions."""
        unit = factor * cls.grid.patch
        return Sizes(path, factor, unit, largest=unit * min(map(int, transformer["axes_lens"][1:])))

    @classmethod
    def default_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], factor: int) -> int:
        return 1024

    @classmethod
    def text_shape(cls, transformer: Mapping[str, Any], tokens: int) -> tuple[int, int]:
        return tokens, int(transformer["cap_feat_dim"])

    @property
    def readers(self) -> tuple[Reader, ...]:
        return (Reader(self._read, self.length, "text_encoder"),)

    def _read(self, prompt: str, verbose: bool = True) -> dict[str, list[int]]:
        """The prompt's tokens and the chat template's, as the pipeline counts them."""
        tokenizer = self.pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return {"input_ids": tokenizer(text, verbose=verbose)["input_ids"]}

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        texts, nulls = self.pipeline.encode_prompt(
            list(prompts), device=self.reads_on, do_classifier_free_guidance=guided,
            negative_prompt=[negative or ""] * len(prompts), max_sequence_length=self.length,
        )  # fmt: skip
        found = dict(zip(("text_BLE", "mask_BL"), padded(texts, self.length), strict=True))
        if guided:
            found |= dict(zip(("null_text_BLE", "null_mask_BL"), padded(nulls, self.length), strict=True))
        return found

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        dtype = self.dtypes["transformer"]
        texts, masks = condition["text_BLE"].to(dtype), condition["mask_BL"]
        # On the meta device, where memory is told, nothing says how long a text is: as long as it can be.
        own = list(texts) if texts.is_meta else [text[mask] for text, mask in zip(texts, masks, strict=True)]
        made = (network or self.transformer)(
            list(z_BCHW.to(dtype)[:, :, None]), (1000 - t_B) / 1000, own, return_dict=False
        )[0]
        return -torch.stack(list(made))[:, :, 0].float()
