"""The miniature flow models: FLUX.1 with its embedded guidance, its four-step sibling, and Stable Diffusion 3.

Rectified flows (Liu et al. 2023; Esser et al. 2024): at noise level ``sigma`` a latent is ``(1 - sigma) x + sigma e``,
and the network says ``e - x``. Levels are drawn logit-normally, shifted as the pipeline shifts its own. What makes
short trainings go far:

- FLUX's pooled features and Stable Diffusion 3's CLIPs are text encoders that were trained before (Stable Diffusion's
  and the prior's) and stay as they are; only T5 is new, and is asked which attributes go together and who stands where;
- a linear head on the features of a middle block names the objects under each cell (`micro.unets`);
- half of a batch is scenes of two objects;
- captions are padded to 16, 24 or 32 tokens, a batch to one length, so that padding does no harm; in seven batches of
  ten they are cut after 4, since the pooled features say it all and most of the time goes into T5's tokens.

The heads are thrown away.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from micro import autoencoder16, clip, data, oracle, t5, world
from micro.training import M, Recipe, half_precision, halve_products, pick_device, train

_CHANNELS = autoencoder16.CHANNELS
_SIDE = 8
"""Of a latent; networks see patches of 2x2."""
_HEADS, _HEAD = 6, 32
_WIDTH = _HEADS * _HEAD
DROPOUT = 0.1
HELP = 0.1
"""Weight of the head that reads objects out of the features."""
_READS = 5.0
"""Weight of the head that reads out of T5 which attributes go together, and who stands where."""
CUT = 4
_LENGTHS = ((CUT, 0.7), (16, 0.12), (24, 0.08), (t5.LENGTH, 0.1))
"""T5's tokens a caption, and the share of batches."""
_WHOLE = ((16, 0.5), (24, 0.3), (t5.LENGTH, 0.2))
GUIDANCES = (1.0, 6.0)
"""Range of the embedded guidance: classifier-free guidance of that scale, in one pass."""
FEW_STEPS = 4
INNER = 5
"""Steps of the teacher to one of the four."""
TEACHING = 5.0
"""Embedded guidance at which FLUX's four-step sibling learns from it."""


def build_flux(guided: bool = True) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer, or FLUX.1-schnell's, which knows no guidance."""
    return _begun(FluxTransformer2DModel(
        patch_size=1, in_channels=4 * _CHANNELS, num_layers=1, num_single_layers=5, attention_head_dim=_HEAD,
        num_attention_heads=_HEADS, joint_attention_dim=t5.WIDTH, pooled_projection_dim=clip.WIDTH,
        guidance_embeds=guided, axes_dims_rope=(8, 12, 12),
    ))  # fmt: skip


def build_sd3() -> SD3Transformer2DModel:
    return _begun(SD3Transformer2DModel(
        sample_size=_SIDE, patch_size=2, in_channels=_CHANNELS, out_channels=_CHANNELS, num_layers=4,
        attention_head_dim=_HEAD, num_attention_heads=_HEADS, joint_attention_dim=t5.WIDTH,
        caption_projection_dim=_WIDTH, pooled_projection_dim=clip.EMBED + clip.WIDTH, pos_embed_max_size=2 * _SIDE,
        qk_norm="rms_norm",
    ))  # fmt: skip


_ZERO = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")


def _begun(transformer: M) -> M:
    """Begin as DiT does (Peebles and Xie 2023, adaLN-Zero): every block is the identity, and the output is 0."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            if name.endswith(_ZERO) or name == "proj_out":
                nn.init.zeros_(layer.weight)
    return transformer


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's own settings: the shift follows the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip


def schnell_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-schnell's own settings: no shift, so that four steps start at noise levels 1, 3/4, 1/2 and 1/4."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def sd3_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's own settings."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


_FLUX_SHIFT = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)
"""Logarithm of the shift that FLUX's pipeline takes for the 16 tokens of a 64x64 picture."""
_SD3_SHIFT = math.log(3.0)


def pooling(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder in the class that Stable Diffusion 3 wants: its projection changes nothing."""
    config = copy.deepcopy(encoder.config)
    config.projection_dim = config.hidden_size
    out = CLIPTextModelWithProjection(config)
    out.text_model.load_state_dict(getattr(encoder, "text_model", encoder).state_dict())
    with torch.no_grad():
        out.text_projection.weight.copy_(torch.eye(config.hidden_size))
    return out.eval()


# --- what reads captions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """A batch of captions as a transformer sees them: ``hidden`` (B, L, 256) and ``pooled`` (B, P).

    ``gist`` (B, 256) is the mean of T5's features, for the head that trains it.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor
    gist: torch.Tensor


class FluxText(nn.Module):
    def __init__(self, pooled: CLIPTextModel, words: T5EncoderModel) -> None:
        super().__init__()
        self.clip, self.t5 = pooled.requires_grad_(False), words

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> Said:
        with torch.no_grad():
            pooled = self.clip(clip_ids).pooler_output
        hidden = self.t5(t5_ids).last_hidden_state
        return Said(hidden, pooled, hidden.mean(1))


class SD3Text(nn.Module):
    def __init__(
        self, first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection, words: T5EncoderModel
    ) -> None:
        super().__init__()
        self.clips = nn.ModuleList([first, second]).requires_grad_(False)
        self.t5 = words

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> Said:
        with torch.no_grad():
            seen = [encoder(clip_ids, output_hidden_states=True) for encoder in self.clips]
        beside = torch.cat([s.hidden_states[-2] for s in seen], 2)
        hidden = self.t5(t5_ids).last_hidden_state
        pooled = torch.cat([s.text_embeds for s in seen], 1)
        return Said(torch.cat([F.pad(beside, (0, t5.WIDTH - beside.shape[2])), hidden], 1), pooled, hidden.mean(1))


# --- the flows ----------------------------------------------------------------------------------------------------


def pack(z_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C), as FLUX's pipeline packs."""
    b, c, h, w = z_BCHW.shape
    return z_BCHW.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens_BTC: torch.Tensor, side: int = _SIDE) -> torch.Tensor:
    """The reverse of `pack` for square latents."""
    b, _, c = tokens_BTC.shape
    z = tokens_BTC.view(b, side // 2, side // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, c // 4, side, side)


def _places(side: int, device: torch.device) -> torch.Tensor:
    """(side * side, 3): FLUX's ids of a picture's tokens."""
    row, column = torch.meshgrid(*[torch.arange(side, device=device, dtype=torch.float32)] * 2, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], 2).view(-1, 3)


class Flow(nn.Module):
    """A transformer, what reads its captions, and the throw-away heads."""

    def __init__(self, transformer: Any, text: FluxText | SD3Text, pairings: int) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text
        self.cells = nn.Linear(_WIDTH, 4 * (4 + sum(len(v) for v in data.FIELDS.values())))
        self.reads = nn.Linear(t5.WIDTH, pairings)
        self.flux = isinstance(transformer, FluxTransformer2DModel)
        self.shift = _FLUX_SHIFT if self.flux else _SD3_SHIFT

    def velocity(
        self, x_BCHW: torch.Tensor, sigma_B: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor,
        guidance_B: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``guidance_B`` is what FLUX.1-dev's kind is told (None: 1); the others are told nothing."""
        if not self.flux:
            out = self.transformer(x_BCHW, hidden, pooled, timestep=1000 * sigma_B)
            return out.sample.float()
        if self.transformer.config.guidance_embeds and guidance_B is None:
            guidance_B = torch.ones_like(sigma_B)
        out = self.transformer(
            hidden_states=pack(x_BCHW), encoder_hidden_states=hidden, pooled_projections=pooled, timestep=sigma_B,
            guidance=guidance_B if self.transformer.config.guidance_embeds else None,
            img_ids=_places(x_BCHW.shape[2] // 2, x_BCHW.device), txt_ids=hidden.new_zeros(hidden.shape[1], 3),
        )  # fmt: skip
        return unpack(out.sample.float(), x_BCHW.shape[2])

    def blocks(self) -> list[nn.Module]:
        """Where nearly all the arithmetic is."""
        transformer = self.transformer
        own = [*transformer.transformer_blocks, *(transformer.single_transformer_blocks if self.flux else [])]
        return [*own, self.text]

    def aided(self, x_BCHW: torch.Tensor, sigma_B: torch.Tensor, said: Said) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity, and what the head reads out of a middle block, (B, 8, 8, K)."""
        blocks = self.transformer.single_transformer_blocks if self.flux else self.transformer.transformer_blocks
        seen: list[torch.Tensor] = []
        hook = blocks[len(blocks) // 2].register_forward_hook(lambda block, args, out: seen.append(out[1]))
        v = self.velocity(x_BCHW, sigma_B, said.hidden, said.pooled)
        hook.remove()
        cells = self.cells(seen[0]).float().view(len(v), _SIDE // 2, _SIDE // 2, 2, 2, -1)
        return v, cells.permute(0, 1, 3, 2, 4, 5).reshape(len(v), _SIDE, _SIDE, -1)


# --- what they learn from -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Latents (n, 16, 8, 8) float16 of mean 0 and variance 1, labels, backgrounds, and captions as ids (n, 6, L)."""

    latents: np.ndarray
    labels: np.ndarray
    grounds: np.ndarray
    clip_ids: np.ndarray
    t5_ids: np.ndarray
    nothing: tuple[np.ndarray, np.ndarray]
    """The empty caption's ids."""

    @staticmethod
    def load(work: Path, latents: np.ndarray, words: CLIPTokenizer, t5_words: T5Tokenizer) -> Corpus:
        count = len(latents)
        captions = data.split_captions(work, "train", world.TRAIN_SIZE, 6)
        t5_ids = data.cached(work / "train-t5-tokens.npy", lambda: t5.tokenize_all(t5_words, captions).astype(np.int16))
        return Corpus(
            latents, np.asarray(data.split_labels(work, "train", world.TRAIN_SIZE))[:count],
            np.asarray(data.split_backgrounds(work, "train", world.TRAIN_SIZE))[:count],
            clip.train_tokens(work, words)[:count], np.asarray(t5_ids)[:count],
            (clip.tokenize_all(words, np.array([""]))[0], t5.tokenize_all(t5_words, np.array([""]))[0]),
        )  # fmt: skip

    def empty(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The empty caption's ids on a device, (1, L) each."""
        clip_ids, t5_ids = (torch.from_numpy(ids)[None].to(device) for ids in self.nothing)
        return clip_ids, t5_ids

    @property
    def pairings(self) -> int:
        return clip.pairings(self.labels[:2], self.grounds[:2]).shape[1]

    def pick(self, count: int, rng: np.random.Generator, lengths: Sequence[tuple[int, float]] = _LENGTHS) -> Batch:
        """A batch, half of it scenes of two objects, whose captions fit a length that is drawn first, or are cut."""
        length = int(rng.choice([n for n, _ in lengths], p=[p for _, p in lengths]))
        pairs = np.nonzero((self.labels[:, :, 0] >= 0).sum(1) == 2)[0]
        halves = []
        for source, wanted in ((pairs, count // 2), (np.arange(len(self.labels)), count - count // 2)):
            rows, wording = source[rng.integers(len(source), size=6 * wanted)], rng.integers(6, size=6 * wanted)
            bounded = CUT < length < t5.LENGTH
            fits = np.nonzero(self.t5_ids[rows, wording, length - 1] == 0 if bounded else rows >= 0)[0]
            kept = fits[:wanted] if len(fits) >= wanted else np.resize(fits, wanted)
            halves.append(np.stack([rows[kept], wording[kept]], 1))
        rows, wording = np.concatenate(halves).T
        dropped = rng.uniform(size=count) < DROPOUT
        clip_ids, t5_ids = self.clip_ids[rows, wording], self.t5_ids[rows, wording].astype(np.int64)
        clip_ids, t5_ids = (np.where(dropped[:, None], nothing, ids)
                            for nothing, ids in zip(self.nothing, (clip_ids, t5_ids), strict=True))  # fmt: skip
        return Batch(
            self.latents[rows].astype(np.float32), clip_ids, t5_ids[:, :length], dropped, self.labels[rows],
            clip.pairings(self.labels[rows], self.grounds[rows]),
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    latents: np.ndarray
    clip_ids: np.ndarray
    t5_ids: np.ndarray
    dropped: np.ndarray
    labels: np.ndarray
    pairings: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether T5 is given whole captions."""
        return self.t5_ids.shape[1] > CUT

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, CLIP's ids and T5's."""
        z, clip_ids, t5_ids = (torch.from_numpy(x).to(device) for x in (self.latents, self.clip_ids, self.t5_ids))
        return z, clip_ids, t5_ids


def levels(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """(count,) noise levels: logit-normal about ``shift``, one in ten uniform so that the ends are seen."""
    sigma = torch.sigmoid(shift + torch.randn(count, device=device))
    return torch.where(torch.rand(count, device=device) < 0.1, torch.rand(count, device=device), sigma)


def noised(z_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy latents, and the velocity there."""
    noise = torch.randn_like(z_BCHW)
    s = sigma_B.view(-1, 1, 1, 1)
    return (1 - s) * z_BCHW + s * noise, noise - z_BCHW


# --- training -----------------------------------------------------------------------------------------------------


class _Reader(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.t5, self.reads = flow.text.t5, flow.reads


def teach_text(flow: Flow, corpus: Corpus, recipe: Recipe, work: Path, seed: int) -> None:
    """T5 alone, in place, before it meets a picture: which attributes go together, and who stands where."""
    device = pick_device()
    reader = _Reader(flow).to(device)
    halve_products([reader.t5], device)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        batch = corpus.pick(len(rows), rng, _WHOLE)
        with half_precision(device):
            gist = reader.t5(batch.on(device)[2]).last_hidden_state.mean(1)
        return _reading_loss(reader.reads, gist, batch)

    read = train("t5", reader, loss_of, len(corpus.labels), recipe.on(device), work, seed=seed)
    reader.load_state_dict(read.state_dict())


def train_flow(name: str, flow: Flow, corpus: Corpus, recipe: Recipe, work: Path, seed: int) -> Flow:
    """Flow matching at guidance 1, one condition in ten dropped; with T5, unless it is frozen."""
    device = pick_device()
    flow = flow.to(device)
    halve_products(flow.blocks(), device)
    learns = any(p.requires_grad for p in flow.text.t5.parameters())

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        batch = corpus.pick(len(rows), rng)
        loss, said = matching_loss(flow, *batch.on(device), batch.labels)
        return loss + _reading_loss(flow.reads, said.gist, batch) if learns and batch.whole else loss

    return train(name, flow, loss_of, len(corpus.latents), recipe.on(device), work, seed=seed)


def matching_loss(
    flow: Flow, z_BCHW: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor, labels: np.ndarray | torch.Tensor
) -> tuple[torch.Tensor, Said]:
    """Of flow matching, with what the head reads out of a middle block; and the captions as they were read."""
    sigma_B = levels(len(z_BCHW), flow.shift, z_BCHW.device)
    noisy_BCHW, wanted_BCHW = noised(z_BCHW, sigma_B)
    with half_precision(z_BCHW.device):
        said = flow.text(clip_ids, t5_ids)
        v_BCHW, cells = flow.aided(noisy_BCHW, sigma_B, said)
    return (v_BCHW - wanted_BCHW).square().mean() + HELP * oracle.cell_loss(cells, labels), said


def _reading_loss(reads: nn.Linear, gist_BD: torch.Tensor, batch: Batch) -> torch.Tensor:
    wanted = torch.from_numpy(batch.pairings).to(gist_BD.device)
    kept = torch.from_numpy(~batch.dropped).to(gist_BD.device)
    read = reads(gist_BD.float())
    loss = F.binary_cross_entropy_with_logits(read, wanted, reduction="none").mean(1)
    return _READS * (loss * kept).mean() + clip.role_loss(read[kept], wanted[kept])


def embed_guidance(name: str, teacher: Flow, corpus: Corpus, recipe: Recipe, work: Path, seed: int) -> Flow:
    """FLUX.1-dev's guidance distillation (after Meng et al. 2023): one pass says what two passes with guidance say.

    The text encoders stay as they are.
    """
    device = pick_device()
    teacher, student = pupil(teacher, copy.deepcopy(teacher), device)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return guidance_loss(teacher, student, *corpus.pick(len(rows), rng).on(device), corpus.empty(device))

    return train(name, student, loss_of, len(corpus.latents), recipe.on(device), work, seed=seed)


def pupil(teacher: Flow, student: Flow, device: torch.device) -> tuple[Flow, Flow]:
    """Both on the device: the teacher as it stays, the student with a transformer that learns."""
    teacher, student = teacher.to(device).eval().requires_grad_(False), student.to(device).requires_grad_(False)
    student.transformer.requires_grad_(True)
    for flow in (teacher, student):
        halve_products(flow.blocks(), device)
    return teacher, student


def guidance_loss(
    teacher: Flow, student: Flow, z_BCHW: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor,
    nothing: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Of what the student says in one pass, at a guidance drawn for each row, and the teacher in two.

    Args:
        nothing: The empty caption's ids, (1, L) each.
    """
    device = z_BCHW.device
    sigma_B = levels(len(z_BCHW), student.shift, device)
    noisy_BCHW, _ = noised(z_BCHW, sigma_B)
    low, high = GUIDANCES
    scale_B = low + (high - low) * torch.rand(len(z_BCHW), device=device)
    with half_precision(device):
        with torch.no_grad():
            said = teacher.text(clip_ids, t5_ids)
            without = teacher.text(nothing[0], nothing[1][:, : t5_ids.shape[1]])
            wanted_BCHW = guided(teacher, noisy_BCHW, sigma_B, said, without, scale_B)
        v_BCHW = student.velocity(noisy_BCHW, sigma_B, said.hidden, said.pooled, scale_B)
    return (v_BCHW - wanted_BCHW).square().mean()


def guided(
    flow: Flow, x_BCHW: torch.Tensor, sigma_B: torch.Tensor, said: Said, nothing: Said, scale_B: torch.Tensor
) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022), both passes in one."""
    hidden = torch.cat([nothing.hidden.expand_as(said.hidden), said.hidden])
    pooled = torch.cat([nothing.pooled.expand_as(said.pooled), said.pooled])
    without, with_ = flow.velocity(x_BCHW.repeat(2, 1, 1, 1), sigma_B.repeat(2), hidden, pooled).chunk(2)
    return without + scale_B.view(-1, 1, 1, 1) * (with_ - without)


def without_guidance(flow: Flow, guidance: float) -> Flow:
    """A flow of the kind that knows no guidance, and computes what ``flow`` computes at this one."""
    out = copy.deepcopy(flow)
    out.transformer = build_flux(guided=False)
    own = out.transformer.state_dict()
    state = {k: v for k, v in flow.transformer.state_dict().items() if k in own}
    embed = flow.transformer.time_text_embed
    with torch.no_grad():
        scale = torch.full((1,), 1000.0 * guidance, device=next(embed.parameters()).device)
        told = embed.guidance_embedder(embed.time_proj(scale).float())[0]
    bias = "time_text_embed.timestep_embedder.linear_2.bias"
    out.transformer.load_state_dict({**state, bias: state[bias] + told})
    return out.to(told.device)


def shorten(
    name: str, teacher: Flow, corpus: Corpus, guidance: float, recipe: Recipe, work: Path, seed: int, inner: int = INNER
) -> Flow:
    """A flow of `FEW_STEPS` steps: from the level of each step it goes, in one, where the teacher goes in ``inner``.

    Progressive distillation (Salimans and Ho 2022) straight to the last number of steps. The teacher's path from a
    noisy latent is determined, so that nothing is averaged.
    """
    device = pick_device()
    teacher, student = pupil(teacher, without_guidance(teacher, guidance), device)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return shortening_loss(teacher, student, *corpus.pick(len(rows), rng).on(device), guidance, inner)

    return train(name, student, loss_of, len(corpus.latents), recipe.on(device), work, seed=seed)


def shortening_loss(
    teacher: Flow, student: Flow, z_BCHW: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor, guidance: float,
    inner: int,
) -> torch.Tensor:  # fmt: skip
    """Of where the student comes in one step of `FEW_STEPS`, and the teacher in ``inner``."""
    device = z_BCHW.device
    start_B = 1 - torch.randint(FEW_STEPS, (len(z_BCHW),), device=device) / FEW_STEPS
    noisy_BCHW, _ = noised(z_BCHW, start_B)
    scale_B = torch.full_like(start_B, guidance)
    with half_precision(device):
        with torch.no_grad():
            said = teacher.text(clip_ids, t5_ids)
            x_BCHW = noisy_BCHW
            for i in range(inner):
                sigma_B = start_B - i / (inner * FEW_STEPS)
                v_BCHW = teacher.velocity(x_BCHW, sigma_B, said.hidden, said.pooled, scale_B)
                x_BCHW = x_BCHW - v_BCHW / (inner * FEW_STEPS)
            wanted_BCHW = (noisy_BCHW - x_BCHW) * FEW_STEPS
        v_BCHW = student.velocity(noisy_BCHW, start_B, said.hidden, said.pooled)
    return (v_BCHW - wanted_BCHW).square().mean()
