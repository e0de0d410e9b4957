"""``python -m micro.further``: the shipped flow models trained on from their weights, by a GPU in minutes.

What `micro.train` makes on a CPU ends where the hours end. This goes on from there, with all that a batch needs on the
device: the corpus' latents and captions, and losses without a look at the host.

- ``sd3``: flow matching, one caption in ten left out (`micro.flows.train_flow`).
- ``flux``: the same at guidance 1 for one half of a batch; the other half learns the embedded guidance from what the
  averaged weights say in two passes (`micro.flows.embed_guidance`, with itself for a teacher).
- ``flux-schnell``: `micro.flows.shorten` from the new FLUX; half of the starts are where the student itself comes to,
  so that it learns to go on from its own pictures (as in DAgger, Ross et al. 2011), the other half noised pictures.

Captions are whole, padded to 32 tokens as the pipelines pad them. Text encoders and autoencoder stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from micro import MODELS, assemble, autoencoder16, clip, data, flows, oracle, t5, world
from micro.flows import FEW_STEPS, GUIDANCES, Flow, FluxText, Said, SD3Text
from micro.train import FLUX_GUIDANCE
from micro.training import half_precision, pick_device

_WORDINGS = 6
_INNER = 5
_DROPOUT = 0.1
_HELP = 0.1
_WARMUP = 100


# --- the corpus on the device


@dataclass(frozen=True)
class Corpus:
    """The training pictures on a device: latents (n, 16, 8, 8), labels (n, 3, 7), captions (n, 6, 32) as ids."""

    latents: torch.Tensor
    labels: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    pairs: torch.Tensor
    """Which pictures hold two objects."""
    nothing: tuple[torch.Tensor, torch.Tensor]
    """The empty caption's ids."""

    @staticmethod
    def load(path: Path, device: torch.device) -> Corpus:
        """What `draw` wrote."""
        with np.load(path) as held:
            on = {name: torch.from_numpy(held[name]).to(device) for name in held.files}
        pairs = torch.nonzero((on["labels"][:, :, 0] >= 0).sum(1) == 2)[:, 0]
        nothing = on["no_clip_ids"].long(), on["no_t5_ids"].long()
        return Corpus(on["latents"], on["labels"], on["clip_ids"], on["t5_ids"], pairs, nothing)

    def pick(self, count: int, dropout: float = _DROPOUT) -> Batch:
        """A batch, half of it scenes of two objects."""
        device = self.latents.device
        two = self.pairs[torch.randint(len(self.pairs), (count // 2,), device=device)]
        rows = torch.cat([two, torch.randint(len(self.latents), (count - count // 2,), device=device)])
        wording = torch.randint(_WORDINGS, (count,), device=device)
        dropped = (torch.rand(count, device=device) < dropout)[:, None]
        clip_ids, t5_ids = (
            torch.where(dropped, nothing, ids[rows, wording].long())
            for ids, nothing in zip((self.clip_ids, self.t5_ids), self.nothing, strict=True)
        )
        return Batch(self.latents[rows].float(), self.labels[rows], clip_ids, t5_ids)


def draw(models: Path, count: int, device: torch.device, processes: int, path: Path) -> None:
    """Write a corpus of the first ``count`` pictures of the training split."""
    chunks = np.array_split(np.arange(count), max(1, count // 500))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        parts = list(zip(*pool.imap(partial(_drawn, models), chunks), strict=True))
    pictures, labels, clip_ids, t5_ids = (np.concatenate(part) for part in parts)
    vae = assemble.load("flux", models / "flux").vae.to(device, memory_format=torch.channels_last)
    latents = autoencoder16.encode_scaled(vae, pictures).half().numpy()
    no_clip_ids, no_t5_ids = _tokens(models, np.array([""]))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial.npz")
    np.savez(partial_path, latents=latents, labels=labels, clip_ids=clip_ids, t5_ids=t5_ids, no_clip_ids=no_clip_ids,
             no_t5_ids=no_t5_ids)  # fmt: skip
    partial_path.replace(path)


@dataclass(frozen=True)
class Batch:
    latents: torch.Tensor
    labels: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor


def _drawn(models: Path, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pictures, labels and the ids of the captions (CLIP's, T5's) of some rows."""
    scenes = [world.sample_scene(int(i)) for i in rows]
    captions = np.array(
        [data.captions_of(int(i), scene, "train", _WORDINGS) for i, scene in zip(rows, scenes, strict=True)]
    )
    pictures = np.stack([world.render(scene) for scene in scenes])
    return pictures, np.stack([data.labels(scene) for scene in scenes]), *_tokens(models, captions)


def _tokens(models: Path, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from transformers import CLIPTokenizer, T5Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    words = CLIPTokenizer.from_pretrained(models / "flux" / "tokenizer")
    t5_words = T5Tokenizer.from_pretrained(models / "flux" / "tokenizer_2")
    return clip.tokenize_all(words, captions).astype(np.int16), t5.tokenize_all(t5_words, captions).astype(np.int16)


# --- the models


def opened(models: Path, name: str, device: torch.device) -> Flow:
    """A shipped model as its trainings know it; the throw-away heads are new."""
    pipeline = assemble.load(name, models / name)
    text: FluxText | SD3Text
    if name == "sd3":
        text = SD3Text(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    else:
        text = FluxText(pipeline.text_encoder, pipeline.text_encoder_2)
    flow = Flow(pipeline.transformer, text, pairings=1).to(device)
    flow.text.requires_grad_(False)
    flow.reads.requires_grad_(False)
    return flow


def said_of(flow: Flow, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> Said:
    with torch.no_grad():
        return flow.text(clip_ids, t5_ids)


FLOWS = ("sd3", "flux", "flux-schnell")

Loss = Callable[[Flow, Flow, int], torch.Tensor]
"""Of the model and its average, on a batch of so many."""


def matching(corpus: Corpus, flow: Flow, average: Flow, count: int) -> torch.Tensor:
    """Flow matching, and the objects under each cell read out of a middle block."""
    batch = corpus.pick(count)
    sigma = flows._levels(count, flow.shift, batch.latents.device)
    noisy, wanted = flows._noised(batch.latents, sigma)
    v, cells = flow.aided(noisy, sigma, said_of(flow, batch.clip_ids, batch.t5_ids))
    return (v - wanted).square().mean() + _HELP * oracle.cell_loss(cells, batch.labels)


def guided_matching(corpus: Corpus, flow: Flow, average: Flow, count: int) -> torch.Tensor:
    """`matching` at guidance 1, and the embedded guidance as the averaged weights tell it."""
    loss = matching(corpus, flow, average, count // 2)
    batch = corpus.pick(count - count // 2, dropout=0.0)
    low, high = GUIDANCES
    guidance = low + (high - low) * torch.rand(len(batch.latents), device=batch.latents.device)
    sigma = flows._levels(len(batch.latents), flow.shift, batch.latents.device)
    noisy, _ = flows._noised(batch.latents, sigma)
    said, nothing = (said_of(flow, *ids) for ids in ((batch.clip_ids, batch.t5_ids), [x[:1] for x in corpus.nothing]))
    with torch.no_grad():
        wanted = flows.guided(average, noisy, sigma, said, nothing, guidance)
    return loss + (flow.velocity(noisy, sigma, said.hidden, said.pooled, guidance) - wanted).square().mean()


def few_steps(corpus: Corpus, teacher: Flow, flow: Flow, average: Flow, count: int) -> torch.Tensor:
    """One step of the student where the teacher at `FLUX_GUIDANCE` makes five."""
    batch = corpus.pick(count, dropout=0.0)
    said = said_of(teacher, batch.clip_ids, batch.t5_ids)
    device, step = batch.latents.device, 1 / FEW_STEPS
    level = torch.randint(FEW_STEPS, (count,), device=device)
    start = 1 - level * step
    with torch.no_grad():
        noisy, _ = flows._noised(batch.latents, start)
        x, own = torch.randn_like(noisy), torch.zeros_like(noisy)
        for number in range(FEW_STEPS):
            own = torch.where((level == number).view(-1, 1, 1, 1), x, own)
            if number < FEW_STEPS - 1:
                x = x - step * flow.velocity(x, torch.full_like(start, 1 - number * step), said.hidden, said.pooled)
        noisy = torch.where((torch.rand(count, device=device) < 0.5).view(-1, 1, 1, 1), own, noisy)
        x, scale = noisy, torch.full_like(start, FLUX_GUIDANCE)
        for i in range(_INNER):
            x = x - step / _INNER * teacher.velocity(x, start - i * step / _INNER, said.hidden, said.pooled, scale)
        wanted = (noisy - x) / step
    return (flow.velocity(noisy, start, said.hidden, said.pooled) - wanted).square().mean()


# --- training


def go_on(name: str, flow: Flow, loss_of: Loss, *, batch: int, lr: float, seconds: float, seed: int) -> Flow:
    """AdamW for so many seconds, warmed up and annealed by the clock; the averaged weights."""
    torch.manual_seed(seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on an H200 its backward pass failed for FLUX
    device = next(flow.parameters()).device
    flow.transformer.requires_grad_(True)
    params = [p for p in flow.parameters() if p.requires_grad]
    average = copy.deepcopy(flow).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    flow.train()
    flow.text.eval()
    began, step, losses, told = time.monotonic(), 0, [], 0.0
    while (done := (time.monotonic() - began) / seconds) < 1:
        rate = lr * min(1.0, (step + 1) / _WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with half_precision(device):
            loss = loss_of(flow, average, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(flow.parameters()), 1 - decay)
        losses.append(loss.detach())
        if step % 20 == 0 and time.monotonic() - began > told + 10:
            mean, told = float(torch.stack(losses).mean()), time.monotonic() - began
            print(
                f"[{name}] step {step} loss {mean:.4f} lr {rate:.1e} {step * batch / told:.0f} pictures/s", flush=True
            )
            losses = []
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: the loss is {mean} at step {step}; lower the learning rate")
    print(
        f"[{name}] {step} steps of {batch}: {step * batch:,} pictures in {time.monotonic() - began:.0f} s", flush=True
    )
    return average


def write(models: Path, name: str, flow: Flow, output: Path) -> None:
    """The pipeline's folder with the new transformer."""
    shutil.copytree(models / name, output / name, dirs_exist_ok=True)
    assemble.save_part(flow.transformer, output / name / "transformer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m micro.further", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--models", type=Path, default=MODELS, help="what to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipelines")
    parser.add_argument("--corpus", type=Path, default=Path("micro/work/corpus.npz"), help="drawn there if missing")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training each; for flux-schnell half of them")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=world.TRAIN_SIZE)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    device, began = pick_device(), time.monotonic()
    if not asked.corpus.exists():
        draw(asked.models, asked.pictures, device, asked.processes, asked.corpus)
        print(f"{asked.pictures:,} pictures drawn and encoded in {time.monotonic() - began:.0f} s", flush=True)
    corpus = Corpus.load(asked.corpus, device)
    common: dict[str, Any] = {"batch": asked.batch, "lr": asked.lr, "seconds": asked.seconds}
    if "sd3" in asked.only:
        flow = go_on("sd3", opened(asked.models, "sd3", device), partial(matching, corpus), seed=21, **common)
        write(asked.models, "sd3", flow, asked.output)
    if "flux" in asked.only:
        flow = go_on("flux", opened(asked.models, "flux", device), partial(guided_matching, corpus), seed=22, **common)
        write(asked.models, "flux", flow, asked.output)
    if "flux-schnell" in asked.only:
        own = asked.output if (asked.output / "flux").exists() else asked.models
        teacher = opened(own, "flux", device).eval().requires_grad_(False)
        student = opened(asked.models, "flux-schnell", device)
        common |= {"seconds": asked.seconds / 2, "lr": asked.lr / 2}
        flow = go_on("flux-schnell", student, partial(few_steps, corpus, teacher), seed=23, **common)
        write(asked.models, "flux-schnell", flow, asked.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
