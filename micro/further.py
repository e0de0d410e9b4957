"""``python -m micro.further``: a shipped flow model trained on from its weights.

What `micro.train` makes ends where the hours end. This goes on from there, on a GPU or a CPU, with the same losses, and
with all that a batch needs on the device: the corpus' latents and captions, and a loss without a look at the host. Text
encoders and autoencoder stay as they are. FLUX goes on at guidance 1, and then learns again what two passes say at
others; the four-step FLUX learns from the FLUX beside it.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from micro import MODELS, assemble, autoencoder16, clip, data, flows, t5, world
from micro.flows import Flow, FluxText, SD3Text
from micro.training import Recipe, halve_products, pick_device, train

NAMES = ("flux", "flux-schnell", "sd3")
_WORDINGS = 6
_CUT = 0.85
"""Share of batches whose captions T5 is given cut."""
_GUIDING = 0.15
"""Of the minutes of FLUX, for the guidance."""


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

    def pick(self, count: int, rng: np.random.Generator, dropout: float = flows.DROPOUT) -> Batch:
        """A batch, half of it scenes of two objects; its captions are whole, or cut as most are in `micro.flows`."""
        device = self.latents.device
        length = flows.CUT if rng.uniform() < _CUT else t5.LENGTH
        two = self.pairs[torch.randint(len(self.pairs), (count // 2,), device=device)]
        rows = torch.cat([two, torch.randint(len(self.latents), (count - count // 2,), device=device)])
        wording = torch.randint(_WORDINGS, (count,), device=device)
        dropped = (torch.rand(count, device=device) < dropout)[:, None]
        clip_ids, t5_ids = (
            torch.where(dropped, nothing, ids[rows, wording].long())
            for ids, nothing in zip((self.clip_ids, self.t5_ids), self.nothing, strict=True)
        )
        return Batch(self.latents[rows].float(), clip_ids, t5_ids[:, :length], self.labels[rows])


def draw(models: Path, count: int, device: torch.device, processes: int, path: Path) -> None:
    """Write a corpus of the first ``count`` pictures of the training split."""
    chunks = np.array_split(np.arange(count), max(1, count // 500))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        parts = list(zip(*pool.imap(partial(_drawn, models), chunks), strict=True))
    pictures, labels, clip_ids, t5_ids = (np.concatenate(part) for part in parts)
    vae = assemble.load("sd3", models / "sd3").vae.to(device, memory_format=torch.channels_last)
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
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def shown(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, CLIP's ids and T5's."""
        return self.latents, self.clip_ids, self.t5_ids


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
    words = CLIPTokenizer.from_pretrained(models / "sd3" / "tokenizer")
    t5_words = T5Tokenizer.from_pretrained(models / "sd3" / "tokenizer_3")
    return clip.tokenize_all(words, captions).astype(np.int16), t5.tokenize_all(t5_words, captions).astype(np.int16)


# --- the models


def opened(name: str, models: Path, device: torch.device) -> Flow:
    """A shipped model as its training knows it; the throw-away heads are new."""
    pipeline = assemble.load(name, models / name)
    text: FluxText | SD3Text
    if name == "sd3":
        text = SD3Text(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    else:
        text = FluxText(pipeline.text_encoder, pipeline.text_encoder_2)
    return Flow(pipeline.transformer, text, pairings=1).to(device).requires_grad_(False)


def match(name: str, flow: Flow, corpus: Corpus, recipe: Recipe, work: Path) -> Flow:
    """Flow matching at guidance 1: `micro.flows.train_flow` on batches that are picked on the device."""
    flow.transformer.requires_grad_(True)
    flow.cells.requires_grad_(True)
    halve_products(flow.blocks(), next(flow.parameters()).device)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        batch = corpus.pick(len(rows), rng)
        return flows.matching_loss(flow, *batch.shown, batch.labels)[0]

    return train(f"{name}-further", flow, loss_of, len(corpus.latents), recipe, work, seed=21)


def guide(flow: Flow, corpus: Corpus, recipe: Recipe, work: Path) -> Flow:
    """`micro.flows.embed_guidance` on batches that are picked on the device."""
    teacher, student = flows.pupil(flow, copy.deepcopy(flow), next(flow.parameters()).device)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return flows.guidance_loss(teacher, student, *corpus.pick(len(rows), rng).shown, corpus.nothing)

    return train("flux-guidance-further", student, loss_of, len(corpus.latents), recipe, work, seed=22)


def shorten(teacher: Flow, few: Flow, corpus: Corpus, recipe: Recipe, work: Path) -> Flow:
    """`micro.flows.shorten` on batches that are picked on the device, from the four-step model's own weights."""
    teacher, student = flows.pupil(teacher, few, next(few.parameters()).device)

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        picked = corpus.pick(len(rows), rng).shown
        return flows.shortening_loss(teacher, student, *picked, flows.TEACHING, flows.INNER)

    return train("flux-schnell-further", student, loss_of, len(corpus.latents), recipe, work, seed=23)


def go_on(name: str, models: Path, corpus: Corpus, recipe: Recipe, work: Path) -> Flow:
    """One of `NAMES` from the weights in ``models``; checkpoints are kept in ``work``."""
    flow = opened(name, models, corpus.latents.device)
    if name == "sd3":
        return match(name, flow, corpus, recipe, work)
    if name == "flux-schnell":
        return shorten(opened("flux", models, corpus.latents.device), flow, corpus, recipe, work)
    flow = match(name, flow, corpus, replace(recipe, minutes=(1 - _GUIDING) * recipe.minutes), work)
    return guide(flow, corpus, replace(recipe, minutes=_GUIDING * recipe.minutes), work)


def write(name: str, models: Path, flow: Flow, output: Path) -> None:
    """The pipeline's folder with the new transformer."""
    shutil.copytree(models / name, output, dirs_exist_ok=True)
    assemble.save_part(flow.transformer, output / "transformer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m micro.further", description=__doc__)
    parser.add_argument("--model", choices=NAMES, required=True)
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder whose models are to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--corpus", type=Path, default=Path("micro/work/corpus.npz"), help="drawn there if missing")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training; stopped, it resumes")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=world.TRAIN_SIZE)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    device, began = pick_device(), time.monotonic()
    if not asked.corpus.exists():
        draw(asked.models, asked.pictures, device, asked.processes, asked.corpus)
        print(f"{asked.pictures:,} pictures drawn and encoded in {time.monotonic() - began:.0f} s", flush=True)
    corpus = Corpus.load(asked.corpus, device)
    recipe = Recipe(steps=10**9, batch=asked.batch, lr=asked.lr, minutes=asked.minutes, warmup=100)
    made = go_on(asked.model, asked.models, corpus, recipe, asked.corpus.parent)
    write(asked.model, asked.models, made, asked.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
