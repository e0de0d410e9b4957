"""Stable Diffusion 1.x, 2.x and SDXL as plain functions of tensors: encode, decode, condition, predict.

A model is a folder in diffusers' layout or a hub id. What comes out behaves exactly as the diffusers pipeline of that
folder, so that latents found here regenerate their picture there.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents as the U-Net sees them (scaled); `m_BCHW` the network's
output; L text tokens, E their width. A condition is a dict of tensors whose first dimension is B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Condition = dict[str, torch.Tensor]
"""`text_BLE`; with guidance also `null_text_BLE`; for SDXL also `pooled_BE`, `null_pooled_BE` and `time_ids_B6`."""

Predict = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]
"""m_BCHW = predict(z_BCHW, t_B, condition): rows may stand at different times."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Geometry:
    """What a model folder's configuration says before any weight is loaded.

    Attributes:
        kind: "sd" or "sdxl".
        size: Side of a picture in pixels.
        latent_shape: (C, H, W) of its latents.
        scaling_factor: Latents are the posterior's mean times this.
        scheduler: The scheduler's configuration.
        text_shape: (L, E) of a text condition.
    """

    kind: str
    size: int
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    scheduler: Mapping[str, Any]
    text_shape: tuple[int, int]


def read_geometry(path: str, *, revision: str | None = None, size: int | None = None) -> Geometry:
    """Read a model's configuration; loads no weights.

    Args:
        path: A diffusers folder, or a hub id.
        size: Side of the pictures to invert; the model's own when None.

    Raises:
        ValueError: Not a Stable Diffusion model, or a size that its autoencoder cannot divide.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig

    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
        vae = AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
        scheduler = DDIMScheduler.load_config(path, subfolder="scheduler", revision=revision)
        text = CLIPTextConfig.from_pretrained(path, subfolder="text_encoder", revision=revision or "main")
    except OSError as error:
        raise ValueError(
            f"model {path!r} is no diffusers folder or hub id with a U-Net, a VAE and a scheduler: "
            f"{str(error).splitlines()[0]}"
        ) from error
    pipeline = str(index.get("_class_name"))
    if not pipeline.startswith("StableDiffusion"):
        raise ValueError(f"model {path!r} is a {pipeline}; inversion knows Stable Diffusion 1.x, 2.x and SDXL")
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(f"model {path!r} takes the guidance scale as an input (latent consistency): not supported")
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(f"model {path!r} takes {unet['in_channels']} channels (an inpainting model): not supported")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    size = size or int(unet["sample_size"]) * factor
    down = 2 ** (len(unet["block_out_channels"]) - 1)
    if size % (factor * down):
        raise ValueError(f"size {size} is no multiple of {factor * down}, which model {path!r} needs")
    return Geometry(
        kind="sdxl" if unet.get("addition_embed_type") == "text_time" else "sd",
        size=size,
        latent_shape=(int(vae["latent_channels"]), size // factor, size // factor),
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        scheduler=scheduler,
        text_shape=(int(text.max_position_embeddings), int(unet["cross_attention_dim"])),
    )


class LatentDiffusion:
    """A frozen text-to-image latent diffusion model.

    Latents stay float32 whatever the network's dtype: rounding them to half precision at each of 50 steps would cost
    more than any method of inversion gains. The VAE runs in float32 when it overflows in float16 (`force_upcast`, as
    SDXL's).

    Args:
        pipeline: A loaded `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
    """

    def __init__(self, pipeline: Any, *, dtype: str = "float32", device: str | torch.device = "cpu") -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.kind = "sdxl" if pipeline.unet.config.addition_embed_type == "text_time" else "sd"
        self.unet: Any = self._freeze(pipeline.unet, self.dtype)
        upcast = self.dtype == torch.float16 and pipeline.vae.config.force_upcast
        self.vae_dtype = torch.float32 if upcast else self.dtype
        self.vae: Any = self._freeze(pipeline.vae, self.vae_dtype)
        self._freeze(pipeline.text_encoder, self.dtype)
        if self.kind == "sdxl":
            self._freeze(pipeline.text_encoder_2, self.dtype)

    def _freeze(self, module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        return module.to(self.device, dtype).eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> LatentDiffusion:
        """Load a diffusers folder or hub id. The safety checker is left out: it judges pictures, it makes none."""
        from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

        index = DiffusionPipeline.load_config(path, revision=revision)
        is_sdxl = str(index["_class_name"]).startswith("StableDiffusionXL")
        # Loaded in float32 and cast afterwards: half-precision loading would round a VAE that has to run in float32.
        options: dict[str, Any] = {"revision": revision, "variant": variant, "torch_dtype": torch.float32}
        if is_sdxl:
            pipeline = StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False, **options)
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(
                path, safety_checker=None, requires_safety_checker=False, **options
            )
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, dtype=dtype, device=device)

    @torch.no_grad()
    def condition(
        self, prompts: Sequence[str], *, size: int, guided: bool = False, negative: str | None = None
    ) -> Condition:
        """The text condition of each prompt, as the pipeline would make it.

        Args:
            prompts: One prompt a row; "" is the model's empty prompt.
            size: Side of the pictures in pixels (SDXL is told it).
            guided: Also give the negative condition, which guidance above 1 needs.
            negative: The negative prompt; the model's empty one when None.
        """
        negatives = None if negative is None else [negative] * len(prompts)
        made = self.pipeline.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
        )
        condition = {"text_BLE": made[0]}
        if guided:
            condition["null_text_BLE"] = made[1]
        if self.kind == "sdxl":
            condition["pooled_BE"] = made[2]
            if guided:
                condition["null_pooled_BE"] = made[3]
            ids = torch.tensor([size, size, 0, 0, size, size], dtype=self.dtype, device=self.device)
            condition["time_ids_B6"] = ids.repeat(len(prompts), 1)
        return condition

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents (float32) of pictures in [-1, 1]: the mean of the VAE's posterior, scaled."""
        mean_BCHW = self.vae.encode(x_BCHW.to(self.device, self.vae_dtype)).latent_dist.mean.float()
        config = self.vae.config
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean_BCHW = (mean_BCHW - self._channels(config.latents_mean)) / self._channels(config.latents_std)
        return mean_BCHW * config.scaling_factor

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Pictures (float32, about [-1, 1], not clamped) of latents."""
        config = self.vae.config
        z_BCHW = z_BCHW.float() / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            z_BCHW = z_BCHW * self._channels(config.latents_std) + self._channels(config.latents_mean)
        return self.vae.decode(z_BCHW.to(self.vae_dtype)).sample.float()

    def _channels(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.float32).view(1, -1, 1, 1)

    def forward(
        self, z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition, *, null: bool = False
    ) -> torch.Tensor:
        """One U-Net call without guidance, on the prompt or (`null`) on the negative condition; output in float32."""
        prefix = "null_" if null else ""
        extra = None
        if self.kind == "sdxl":
            extra = {"text_embeds": condition[f"{prefix}pooled_BE"], "time_ids": condition["time_ids_B6"]}
        return self.unet(
            z_BCHW.to(self.dtype),
            t_B,
            encoder_hidden_states=condition[f"{prefix}text_BLE"].to(self.dtype),
            added_cond_kwargs=extra,
            return_dict=False,
        )[0].float()

    def predictor(self, guidance: float = 1.0) -> Predict:
        """The network's output under classifier-free guidance; one U-Net call on 2B rows when guidance is above 1."""
        if guidance <= 1:
            return self.forward

        def predict(z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
            both = {
                name: torch.cat([condition.get(f"null_{name}", value), value])
                for name, value in condition.items()
                if not name.startswith("null_")
            }
            null_BCHW, text_BCHW = self.forward(torch.cat([z_BCHW, z_BCHW]), torch.cat([t_B, t_B]), both).chunk(2)
            return null_BCHW + guidance * (text_BCHW - null_BCHW)

        return predict
