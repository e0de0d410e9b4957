"""The miniature diffusion models: Stable Diffusion's U-Net with its text encoder, and Kandinsky's decoder and prior.

U-Nets are trained to predict noise, with the min-SNR weighting (Hang et al. 2023, gamma 5) and 10 % of the conditions
dropped, on the latents that the VAE and the MOVQ share. What makes short trainings go far:

- a linear head on the features of the first up block names the objects under each cell (in the spirit of REPA, Yu et
  al. 2025, which aligns such features with a pretrained encoder's; the head is thrown away);
- where noise outweighs the picture, its loss is raised by SNR^(-1/3): there the layout is decided, and there the plain
  noise loss, nearly solved by returning the input, says least (ours);
- half of Stable Diffusion's batch is scenes of two objects, the ones with a relation, and its text encoder is asked who
  stands where (without that, its pictures had the axis right and the order by chance);
- the decoder starts from Stable Diffusion's U-Net, whose latents it shares, and has its condition left to learn; what
  it first makes of an embedding is whitened, as the prior's error is: nine tenths of the variance lie along a tenth of
  the axes, but shapes along the others (ours).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from micro import autoencoder, clip, data, oracle, tokenizer, world
from micro.training import Recipe, pick_device, train

_LATENT = 8
_DROPOUT = 0.1
_GAMMA = 5.0
_WIDTHS = (64, 96)
_HELP = 0.1
"""Weight of the head that reads objects out of the features."""
_READS = 5.0
"""Weight of the head that reads out of the text which attributes go together, and who stands where."""


def _unet(**conditioning: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=_LATENT, in_channels=autoencoder.CHANNELS, block_out_channels=_WIDTHS, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=clip.WIDTH, attention_head_dim=4, norm_num_groups=16, **conditioning,
    )  # fmt: skip


def build_sd_unet() -> UNet2DConditionModel:
    return _unet(out_channels=autoencoder.CHANNELS)


def build_decoder_unet() -> UNet2DConditionModel:
    """Twice the output channels, as Kandinsky's: its pipeline splits off (and here ignores) a variance."""
    return _unet(
        out_channels=2 * autoencoder.CHANNELS, encoder_hid_dim=clip.EMBED, encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    )  # fmt: skip


def build_sd_text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(clip.text_config(words, layers=3))


def build_prior() -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=4, attention_head_dim=32, num_layers=4, embedding_dim=clip.EMBED,
        num_embeddings=tokenizer.LENGTH, additional_embeddings=4,
    )  # fmt: skip


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's own settings."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def prior_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0,
        num_train_timesteps=1000,
    )  # fmt: skip


_Noised = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _noised(z_BCHW: torch.Tensor, alphas: torch.Tensor) -> _Noised:
    """Noise each row at a timestep of its own: (noisy latents, timesteps, noise, weight of the noise loss)."""
    t = torch.randint(len(alphas), (len(z_BCHW),), device=z_BCHW.device)
    noise = torch.randn_like(z_BCHW)
    a = alphas[t].view(-1, 1, 1, 1)
    snr = alphas[t] / (1 - alphas[t])
    weight = torch.where(snr < 1, snr.pow(-1 / 3), snr.clamp(max=_GAMMA) / snr)
    return a.sqrt() * z_BCHW + (1 - a).sqrt() * noise, t, noise, weight


def _weighted(predicted: torch.Tensor, noise: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    return ((predicted - noise).square().mean((1, 2, 3)) * weight_B).mean() / weight_B.mean().clamp(min=1e-3)


class _Aided(nn.Module):
    """A U-Net and the throw-away head that reads objects out of its features."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.cells = nn.Linear(_WIDTHS[-1], 4 + sum(len(v) for v in data.FIELDS.values()))

    def forward(self, noisy_BCHW: torch.Tensor, t_B: torch.Tensor, hidden: torch.Tensor | None, labels_BTF: np.ndarray,
                **conditions: object) -> tuple[torch.Tensor, torch.Tensor]:
        """(the U-Net's output, the head's loss)."""
        seen: list[torch.Tensor] = []
        hook = self.unet.up_blocks[0].register_forward_hook(lambda block, args, out: seen.append(out))
        out = self.unet(noisy_BCHW, t_B, hidden, **conditions).sample
        hook.remove()
        return out, oracle.cell_loss(self.cells(seen[0].permute(0, 2, 3, 1)), labels_BTF)


class _TextToImage(nn.Module):
    def __init__(self, words: CLIPTokenizer, pairings: int) -> None:
        super().__init__()
        self.text, self.aided = build_sd_text_encoder(words), _Aided(build_sd_unet())
        self.reads = nn.Linear(clip.WIDTH, pairings)


def train_stable_diffusion(
    work: Path, latents: np.ndarray, recipe: Recipe
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """U-Net and text encoder together; the text encoder also learns which attributes a caption pairs.

    Args:
        latents: (n, C, 8, 8) float16, already scaled to unit variance.
    """
    device, count = pick_device(), len(latents)
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    captions = clip.train_tokens(work, words)
    labels = np.asarray(data.split_labels(work, "train", world.TRAIN_SIZE))
    grounds = np.asarray(data.split_backgrounds(work, "train", world.TRAIN_SIZE))
    empty = torch.from_numpy(clip.tokenize_all(words, np.array([""])))[0].to(device)
    alphas = sd_scheduler().alphas_cumprod.to(device)
    pairs = np.nonzero((labels[:count, :, 0] >= 0).sum(1) == 2)[0]
    torch.manual_seed(4)
    model = _TextToImage(words, clip.pairings(labels[:2], grounds[:2]).shape[1]).to(device)
    model.aided.unet.to(memory_format=torch.channels_last)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        half = len(rows) // 2
        rows = np.sort(np.concatenate([pairs[rows[:half] % len(pairs)], rows[half:]]))
        z = torch.from_numpy(latents[rows].astype(np.float32)).to(device, memory_format=torch.channels_last)
        ids = torch.from_numpy(captions[rows, rng.integers(6, size=len(rows))]).to(device)
        dropped = torch.from_numpy(rng.uniform(size=len(rows)) < _DROPOUT).to(device)
        ids = torch.where(dropped[:, None], empty, ids)
        hidden = model.text(ids).last_hidden_state
        noisy, t, noise, weight = _noised(z, alphas)
        out, helped = model.aided(noisy, t, hidden, labels[rows])
        loss = _weighted(out, noise, weight) + _HELP * helped
        end = (ids == words.eos_token_id).int().argmax(1)
        wanted = torch.from_numpy(clip.pairings(labels[rows], grounds[rows])).to(device)
        said = model.reads(hidden[torch.arange(len(rows)), end])
        reads = F.binary_cross_entropy_with_logits(said, wanted, reduction="none")
        return loss + _READS * (reads.mean(1) * ~dropped).mean() + clip.role_loss(said[~dropped], wanted[~dropped])

    averaged = train("stable-diffusion", model, loss_of, count, recipe, work, seed=4)
    return averaged.text, averaged.aided.unet


def _whitening(embeds: np.ndarray, floor: float) -> torch.Tensor:
    """(E, E): the inverse square root of the covariance, its eigenvalues raised by ``floor`` times their mean."""
    values, axes = np.linalg.eigh(np.cov(embeds[:20_000].astype(np.float64), rowvar=False))
    return torch.from_numpy((axes * (values + floor * values.mean()) ** -0.5) @ axes.T).float()


def train_decoder(
    work: Path, latents: np.ndarray, embeds: np.ndarray, zero: np.ndarray, start: UNet2DConditionModel, recipe: Recipe
) -> UNet2DConditionModel:
    """Image embedding -> latent. Dropped conditions become ``zero``, the embedding of an all-zero picture.

    Args:
        start: Stable Diffusion's U-Net; what the two have in common starts from its weights.
    """
    device, count = pick_device(), min(len(latents), len(embeds))
    alphas = sd_scheduler().alphas_cumprod.to(device)
    nothing = torch.from_numpy(zero).to(device)
    torch.manual_seed(5)
    labels = np.asarray(data.split_labels(work, "train", world.TRAIN_SIZE))
    aided = _Aided(build_decoder_unet()).to(device)
    aided.unet.to(memory_format=torch.channels_last)
    own = aided.unet.state_dict()
    for name, value in start.state_dict().items():
        own[name][: len(value)].copy_(value)  # the last convolution has more channels here
    whitening, mean = _whitening(embeds, 0.01).to(device), torch.from_numpy(embeds.mean(0)).float().to(device)
    with torch.no_grad():
        for layer in (aided.unet.encoder_hid_proj.image_embeds, aided.unet.add_embedding.image_proj):
            layer.weight.copy_(layer.weight @ whitening)
            layer.bias.sub_(layer.weight @ mean)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        rows = np.sort(rows)
        z = torch.from_numpy(latents[rows].astype(np.float32)).to(device, memory_format=torch.channels_last)
        e = torch.from_numpy(embeds[rows].astype(np.float32)).to(device)
        e = e + 0.05 * e.std() * torch.randn_like(e)  # the decoder meets embeddings of imperfect priors
        e = torch.where(torch.from_numpy(rng.uniform(size=(len(rows), 1)) < _DROPOUT).to(device), nothing, e)
        noisy, t, noise, weight = _noised(z, alphas)
        out, helped = aided(noisy, t, None, labels[rows], added_cond_kwargs={"image_embeds": e})
        return _weighted(out[:, : z.shape[1]], noise, weight) + _HELP * helped

    return train("decoder", aided, loss_of, count, recipe, work, seed=5).unet


def train_prior(work: Path, text: CLIPTextModelWithProjection, embeds: np.ndarray, recipe: Recipe) -> PriorTransformer:
    """Caption -> image embedding: predicts the clean, whitened embedding from a noised one (DALL-E 2's prior)."""
    device, count = pick_device(), len(embeds)
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    captions = clip.train_tokens(work, words)
    alphas = prior_scheduler().alphas_cumprod.to(device)
    text = text.to(device).eval().requires_grad_(False)
    mean, std = embeds.mean(0, dtype=np.float64), embeds.std(0, dtype=np.float64)
    white = ((embeds - mean) / std).astype(np.float32)
    metric = _whitening(white, 0.05).to(device)
    empty = torch.from_numpy(clip.tokenize_all(words, np.array([""])))[0].to(device)
    torch.manual_seed(6)
    prior = build_prior().to(device)
    prior.clip_mean.requires_grad_(False).copy_(torch.from_numpy(mean)[None])
    prior.clip_std.requires_grad_(False).copy_(torch.from_numpy(std)[None])

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        clean = torch.from_numpy(white[rows]).to(device)
        ids = torch.from_numpy(captions[rows, rng.integers(6, size=len(rows))]).to(device)
        ids = torch.where(torch.from_numpy(rng.uniform(size=(len(rows), 1)) < _DROPOUT).to(device), empty, ids)
        mask = _attended(ids, words)
        with torch.no_grad():
            said = text(ids, attention_mask=mask)
        t = torch.randint(len(alphas), (len(rows),), device=device)
        a = alphas[t][:, None]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * torch.randn_like(clean)
        out = prior(noisy, t, proj_embedding=said.text_embeds, encoder_hidden_states=said.last_hidden_state,
                    attention_mask=mask.bool())  # fmt: skip
        return ((out.predicted_image_embedding - clean) @ metric).square().mean()

    return train("prior", prior, loss_of, count, recipe, work, seed=6)


def _attended(ids: torch.Tensor, words: CLIPTokenizer) -> torch.Tensor:
    """The tokenizer's attention mask: up to and including the first end token."""
    end = (ids == words.eos_token_id).int().argmax(1, keepdim=True)
    return (torch.arange(ids.shape[1], device=ids.device) <= end).long()
