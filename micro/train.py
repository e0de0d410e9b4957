"""``python -m micro.train``: the miniature models from nothing, in order, on whatever machine there is.

A stopped run resumes where it stopped: every stage keeps a checkpoint, and a finished stage its result, in the work
folder. It ends by assembling the pipelines and printing `micro.evaluate`'s table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, VQModel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)  # fmt: skip

from micro import MODELS, assemble, autoencoder, clip, data, oracle, tokenizer, unets, world
from micro.training import Recipe, pick_device

RECIPES = {
    "oracle": Recipe(steps=2500, batch=64, lr=2e-3),
    "vae-crops": Recipe(steps=3500, batch=32, lr=1.5e-3, final_lr=0.3),
    "vae": Recipe(steps=1500, batch=12, lr=6e-4, warmup=50, final_lr=0.02),
    "movq": Recipe(steps=400, batch=16, lr=3e-4, warmup=50),
    "clip": Recipe(steps=2500, batch=128, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), ema=0.995),
    "prior": Recipe(steps=4000, batch=128, lr=1e-3),
    "decoder": Recipe(steps=6000, batch=64, lr=1e-3),
    "stable-diffusion": Recipe(steps=12000, batch=64, lr=1e-3),
}
"""What the shipped weights aim at; ``--minutes`` shortens each in proportion on a slow machine."""


def _draw(work: Path) -> None:
    for split, count in (("train", world.TRAIN_SIZE), ("heldout", 4000)):
        data.split_pictures(work, split, count)  # type: ignore[arg-type]
        data.split_labels(work, split, count)  # type: ignore[arg-type]
        data.split_backgrounds(work, split, count)  # type: ignore[arg-type]
        data.split_captions(work, split, count, 6)  # type: ignore[arg-type]
    if not (work / "tokenizer" / "vocab.json").exists():
        captions = data.split_captions(work, "train", world.TRAIN_SIZE, 6)
        tokenizer.learn(captions.reshape(-1).tolist(), work / "tokenizer")


def _latents(work: Path) -> np.ndarray:
    """(n, C, 8, 8) float16: the training pictures' latents, of unit variance."""
    vae = AutoencoderKL.from_pretrained(work / "vae").to(pick_device(), memory_format=torch.channels_last)
    pictures = data.split_pictures(work, "train", world.TRAIN_SIZE)
    make = lambda: (autoencoder.encode_all(vae, pictures) * vae.config.scaling_factor).half().numpy()  # noqa: E731
    return data.cached(work / "latents.npy", make)


def _embeds(work: Path) -> np.ndarray:
    """(n, E) float32: the training pictures' image embeddings."""
    model = CLIPVisionModelWithProjection.from_pretrained(work / "image_encoder").to(pick_device())
    pictures = data.split_pictures(work, "train", world.TRAIN_SIZE)
    return data.cached(work / "embeds.npy", lambda: clip.embed_pictures(model, pictures).numpy())


def _zero_embed(work: Path) -> np.ndarray:
    """(E,) float32: the embedding of an all-zero picture, Kandinsky's negative condition."""
    model = CLIPVisionModelWithProjection.from_pretrained(work / "image_encoder")
    with torch.no_grad():
        return model(torch.zeros(1, 3, world.SIZE, world.SIZE)).image_embeds[0].numpy()


def _oracle(work: Path, recipes: dict[str, Recipe]) -> None:
    oracle.train_oracle(work, recipes["oracle"]).save(work / "oracle")


def _vae(work: Path, recipes: dict[str, Recipe]) -> None:
    autoencoder.train_vae(work, recipes["vae-crops"], recipes["vae"]).save_pretrained(work / "vae")


def _movq(work: Path, recipes: dict[str, Recipe]) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae")
    autoencoder.train_movq(work, vae, recipes["movq"]).save_pretrained(work / "movq")


def _clip(work: Path, recipes: dict[str, Recipe]) -> None:
    image, text = clip.train_clip(work, recipes["clip"])
    text.save_pretrained(work / "text_encoder")
    image.save_pretrained(work / "image_encoder")


def _prior(work: Path, recipes: dict[str, Recipe]) -> None:
    text = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder")
    unets.train_prior(work, text, _embeds(work), recipes["prior"]).save_pretrained(work / "prior")


def _decoder(work: Path, recipes: dict[str, Recipe]) -> None:
    start = UNet2DConditionModel.from_pretrained(work / "sd_unet")
    unet = unets.train_decoder(work, _latents(work), _embeds(work), _zero_embed(work), start, recipes["decoder"])
    unet.save_pretrained(work / "decoder")


def _stable_diffusion(work: Path, recipes: dict[str, Recipe]) -> None:
    text, unet = unets.train_stable_diffusion(work, _latents(work), recipes["stable-diffusion"])
    text.save_pretrained(work / "sd_text_encoder")
    unet.save_pretrained(work / "sd_unet")


STAGES: dict[str, tuple[str, Callable[[Path, dict[str, Recipe]], None]]] = {
    "oracle": ("oracle", _oracle),
    "vae": ("vae", _vae),
    "movq": ("movq", _movq),
    "clip": ("image_encoder", _clip),
    "prior": ("prior", _prior),
    "stable-diffusion": ("sd_unet", _stable_diffusion),
    "decoder": ("decoder", _decoder),
}
"""Stage -> (the folder in the work folder that says it is done, what does it)."""


def assemble_all(work: Path, folder: Path) -> None:
    """Write the three pipelines' folders and the oracle's from the trained parts."""
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    assemble.save(assemble.prior(
        CLIPVisionModelWithProjection.from_pretrained(work / "image_encoder"),
        CLIPTextModelWithProjection.from_pretrained(work / "text_encoder"), words,
        PriorTransformer.from_pretrained(work / "prior"),
    ), folder / "prior")  # fmt: skip
    unet, movq = UNet2DConditionModel.from_pretrained(work / "decoder"), VQModel.from_pretrained(work / "movq")
    assemble.save(assemble.decoder(unet, movq), folder / "decoder")
    assemble.save(assemble.stable_diffusion(
        AutoencoderKL.from_pretrained(work / "vae"), CLIPTextModel.from_pretrained(work / "sd_text_encoder"), words,
        UNet2DConditionModel.from_pretrained(work / "sd_unet"),
    ), folder / "stable-diffusion")  # fmt: skip
    oracle.Oracle.load(work / "oracle").save(folder / "oracle")


def _bounded(minutes: float | None) -> dict[str, Recipe]:
    if minutes is None:
        return RECIPES
    total = sum(r.steps * r.batch for r in RECIPES.values())
    return {name: replace(r, minutes=minutes * r.steps * r.batch / total) for name, r in RECIPES.items()}


def main() -> int:
    from micro import evaluate

    parser = argparse.ArgumentParser(prog="python -m micro.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("micro/work"), help="checkpoints and drawn pictures")
    parser.add_argument("--output", type=Path, default=MODELS, help="where the finished folders go")
    parser.add_argument("--minutes", type=float, help="bound on the whole training; each model gets its share")
    parser.add_argument("--only", choices=STAGES, help="train one model, and stop")
    arguments = parser.parse_args()
    work, recipes = arguments.work, _bounded(arguments.minutes)
    work.mkdir(parents=True, exist_ok=True)
    print(f"training on {pick_device()} with {torch.get_num_threads()} threads; work folder {work}", flush=True)
    _draw(work)
    for name, (result, stage) in STAGES.items():
        if arguments.only not in (None, name):
            continue
        if (work / result).exists():
            print(f"[{name}] done before", flush=True)
            continue
        began = time.monotonic()
        stage(work, recipes)
        print(f"[{name}] done in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    if arguments.only:
        return 0
    assemble_all(work, arguments.output)
    return evaluate.run(arguments.output, card=True)


if __name__ == "__main__":
    sys.exit(main())
