"""FLUX.2: layers of a language model as text, latents of an autoencoder that normalises each square of them.

Legend as in `stages.models.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from stages.models.captions import Reader
from stages.models.flow_schedule import FlowGrid
from stages.models.latent import Condition, Network, Predict
from stages.models.settings import LatentModelSettings
from stages.models.transformer import FlowTransformer
from stages.models.usage import Usage


class Flux2Family(FlowTransformer):
    """What FLUX.2's models share (Black Forest Labs, 2025 and 2026); text that is padding has its say in the network.

    Latents are, as its pipelines draw them, those of the autoencoder's 2 x 2 squares: 128 channels at a sixteenth of
    the side.
    """

    transformer_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    encoders = {"text_encoder": "tokenizer"}
    grid = FlowGrid(linear="float64", patch=1, shift="empirical")

    @classmethod
    def channels(cls, vae: Mapping[str, Any]) -> int:
        height, width = vae["patch_size"]
        return int(height * width * vae["latent_channels"])

    @classmethod
    def factor(cls, vae: Mapping[str, Any]) -> int:
        return 2 * super().factor(vae)

    @classmethod
    def default_size(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], factor: int) -> int:
        return 64 * factor

    def tokens_of(self, prompt: str, verbose: bool = True) -> Sequence[int]:
        """A prompt in the chat template that the pipeline puts it in, as tokens."""
        raise NotImplementedError

    @property
    def readers(self) -> tuple[Reader, ...]:
        def read(prompt: str, verbose: bool = True) -> dict[str, Sequence[int]]:
            return {"input_ids": self.tokens_of(prompt, verbose)}

        return (Reader(read, self.length, "text_encoder"),)

    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        """text_BLE, as the pipeline makes it."""
        text_BLE: torch.Tensor = self.pipeline.encode_prompt(
            list(prompts), device=self.reads_on, max_sequence_length=self.length
        )[0]
        return text_BLE

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, network: Any = None,
        guidance: float = 1.0,
    ) -> torch.Tensor:  # fmt: skip
        """See `FlowTransformer`; the time is rounded to the network's type, as the pipelines round it."""
        dtype, (B, C, H, W) = self.dtypes["transformer"], z_BCHW.shape
        text_BLE, device = condition["text_BLE"].to(dtype), z_BCHW.device
        told = torch.full((B,), guidance, device=device) if self.geometry.guiding == "told" else None
        tokens_BNC = (network or self.transformer)(
            hidden_states=z_BCHW.flatten(2).mT.to(dtype), timestep=t_B.to(dtype) / 1000, guidance=told,
            encoder_hidden_states=text_BLE, txt_ids=positions(1, 1, text_BLE.shape[1], device),
            img_ids=positions(H, W, 1, device), return_dict=False,
        )[0]  # fmt: skip
        return tokens_BNC.float().mT.reshape(B, C, H, W)


class Flux2(Flux2Family):
    """FLUX.2-dev, whose guidance is an input of the network."""

    index = "Flux2Pipeline"

    @classmethod
    def guiding(cls, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> Literal["told", "none"]:
        return "told" if transformer["guidance_embeds"] else "none"

    def tokens_of(self, prompt: str, verbose: bool = True) -> Sequence[int]:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input([prompt], system_message=self.pipeline.system_message)
        return list(
            self.pipeline.tokenizer.apply_chat_template(
                messages, add_generation_prompt=False, tokenize=True, return_dict=True
            )["input_ids"][0]
        )

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        """The network is told the guidance: there is no negative side."""
        self.geometry.check_guidance(1.0, negative)
        return {"text_BLE": self.text(prompts)}

    def predictor(self, guidance: float = 1.0) -> Predict:
        self.geometry.check_guidance(guidance, None)
        return self.in_parts(guidance=guidance)


class Flux2Klein(Flux2Family):
    """FLUX.2-klein, which is distilled and has no guidance, and its base models, guided by a second prompt."""

    index = "Flux2KleinPipeline"

    @classmethod
    def guiding(cls, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> Literal["classifier-free", "none"]:
        return "none" if index.get("is_distilled") else "classifier-free"

    @classmethod
    def _usage(cls, settings: LatentModelSettings, parts: Mapping[str, Network], tokens: int) -> Usage:
        return replace(super()._usage(settings, parts, tokens), guidance=partial(_told, tokens))

    def tokens_of(self, prompt: str, verbose: bool = True) -> Sequence[int]:
        tokenizer = self.pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return list(tokenizer(text, verbose=verbose)["input_ids"])

    def encode_prompts(self, prompts: Sequence[str], *, guided: bool, negative: str | None) -> Condition:
        self.geometry.check_guidance(1.0, negative)
        found = {"text_BLE": self.text(prompts)}
        if guided:
            found["null_text_BLE"] = self.text([negative or ""]).expand_as(found["text_BLE"])
        return found

    def predictor(self, guidance: float = 1.0) -> Predict:
        self.geometry.check_guidance(guidance, None)
        return super().predictor(guidance)


def positions(height: int, width: int, length: int, device: torch.device) -> torch.Tensor:
    """(height width length, 4): picture, row, column and word of each token."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, height, width, length)))


def _told(tokens: int, guidance: float, negative: str | None) -> str:
    """See `Usage`: the pipeline takes a negative prompt as numbers alone."""
    asked = "" if tokens == Flux2Klein.tokens else f", max_sequence_length={tokens}"
    said = f", negative_prompt_embeds=pipe.encode_prompt({negative!r}{asked})[0]" if negative else ""
    return f"guidance_scale={guidance}{said}"
