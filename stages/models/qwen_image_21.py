"""Qwen-Image-2.1: text and picture in one causal sequence, latents of an autoencoder of pictures with alpha.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from stages.models.captions import Reader
from stages.models.flow_schedule import FlowGrid
from stages.models.latent import Condition, Network, Sizes
from stages.models.qwen_image import QwenImage
from stages.models.settings import LatentModelSettings
from stages.models.transformer import FlowTransformer, padded, unpadded
from stages.models.usage import Usage


class QwenImage21(FlowTransformer):
    """Qwen-Image-2.1 and -Turbo (Qwen team, 2026).

    Its pipeline reads a prompt however long it is, and where the picture's tokens stand depends on how long: a text is
    never shown to the network with padding.
    """

    index = "QwenImage21Pipeline"
    transformer_class = "QwenImage21Transformer2DModel"
    vae_class = "AutoencoderKLQwenImage21"
    colours = (3, 4)
    encoders = {"text_encoder": "processor"}
    grid = FlowGrid(linear="float64", patch=1)
    recordable = False  # texts are as long as they are
    most_tokens = 8191
    """Positions that the network knows, but for the picture's."""
    guidance_options = staticmethod(QwenImage.guidance_options)
    latents = "pipe._pack_latents(seed, *seed.shape)"

    @classmethod
    def grid_of(cls, index: Mapping[str, Any]) -> FlowGrid:
        own = index.get("sample_sigmas")
        return replace(cls.grid, listed=None if own is None else tuple(own))

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        return int(vae["z_dim"])

    @classmethod
    def factor(cls, vae: Mapping[str, Any]) -> int:
        """The pipeline knows no other."""
        return 16

    @classmethod
    def sizes(cls, path: str, transformer: Mapping[str, Any], factor: int) -> Sizes:
        """The pipeline draws an even number of latents along each side."""
        return Sizes(path, factor, 2 * factor)

    @classmethod
    def default_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], factor: int) -> int:
        return 1024

    @classmethod
    def text_shape(cls, transformer: Mapping[str, Any], tokens: int) -> tuple[int, int]:
        return tokens, int(transformer["context_in_dim"])

    @classmethod
    def _usage(cls, settings: LatentModelSettings, parts: Mapping[str, Network], tokens: int) -> Usage:
        """The pipeline cuts no prompt, and its pictures have an alpha."""
        return replace(
            super()._usage(settings, parts, tokens), more="", picture=ON_WHITE,
            prompt=f'prompt_embeds=pipe.encode_prompt(row["prompt"])[0][:, :{tokens}]',
        )  # fmt: skip

    @property
    def readers(self) -> tuple[Reader, ...]:
        return (Reader(self._read, self.length, "text_encoder"),)

    def _read(self, prompt: str, verbose: bool = True) -> dict[str, list[int]]:
        """The tokens that are kept: without the beginning of the template, with its end."""
        text = self.pipeline.prompt_template_t2i.format(prompt or " ")
        ids = self.pipeline.processor.tokenizer(text, verbose=verbose)["input_ids"]
        return {"input_ids": ids[self.pipeline._drop_idx :]}

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        """A negative prompt is the job's, and not cut.

        Raises:
            ValueError: It is longer than a prompt may be.
        """
        text_BLE, mask_BL = padded(self._texts(prompts), self.length)
        if not guided:
            return {"text_BLE": text_BLE, "mask_BL": mask_BL}
        (null,) = self._texts([negative or ""])
        if len(null) > self.length:
            raise ValueError(
                f"negative: {len(null)} tokens, and model {self.geometry.sizes.model!r} is given {self.length}: write "
                "a shorter one, or raise `max_sequence_length`"
            )
        null_BLE, null_mask_BL = padded([null], self.length)
        nulls = {"null_text_BLE": null_BLE.expand_as(text_BLE), "null_mask_BL": null_mask_BL.expand_as(mask_BL)}
        return {"text_BLE": text_BLE, "mask_BL": mask_BL, **nulls}

    def _texts(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """(L, E) of each prompt, as long as it is."""
        text_BLE, mask_BL, _ = self.pipeline.encode_prompt(list(prompts), device=self.reads_on)
        return unpadded(text_BLE, mask_BL)

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None
    ) -> torch.Tensor:
        """See `FlowTransformer`; a call of the network for each length of text."""
        text_BLE = condition["text_BLE"].to(self.dtypes["transformer"])
        # On the meta device, where memory is told, nothing says how long a text is: as long as it can be.
        lengths = [text_BLE.shape[1]] * len(z_BCHW) if text_BLE.is_meta else condition["mask_BL"].sum(1).tolist()
        if len(set(lengths)) == 1:
            return self._alike(z_BCHW, t_B, text_BLE[:, : lengths[0]], network or self.transformer)
        found: dict[int, torch.Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            made = self._alike(z_BCHW[rows], t_B[rows], text_BLE[rows, :length], network or self.transformer)
            found |= dict(zip(rows, made, strict=True))
        return torch.stack([found[row] for row in range(len(lengths))])

    def _alike(self, z_BCHW: torch.Tensor, t_B: torch.Tensor, text_BLE: torch.Tensor, network: Any) -> torch.Tensor:
        """v_BCHW under texts of one length. The time is rounded to the network's type, as the pipeline rounds it."""
        B, C, H, W = z_BCHW.shape
        # The network takes a slot for four latents of the picture; the meta device has no numbers to tell them by.
        slots = torch.arange(text_BLE.shape[1] + H * W // 4, device="cpu" if z_BCHW.is_meta else z_BCHW.device)
        tokens_BNC = network(
            hidden_states=z_BCHW.flatten(2).mT.to(text_BLE.dtype), timestep=t_B.to(text_BLE.dtype) / 1000,
            encoder_hidden_states=text_BLE, img_shapes=[[(1, H, W)]] * B,
            img_mask=(slots >= text_BLE.shape[1]).expand(B, -1), return_dict=False,
        )[0][:, -H * W :]  # fmt: skip
        return tokens_BNC.float().mT.reshape(B, C, H, W)


ON_WHITE = 'picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")'
"""What `stages.models.autoencoder.on_white` does, on a picture."""
