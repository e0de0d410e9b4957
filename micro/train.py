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
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PriorTransformer,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
    VQModel,
)  # fmt: skip
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5Tokenizer,
)  # fmt: skip

from micro import (
    MODELS,
    assemble,
    autoencoder,
    autoencoder16,
    clip,
    data,
    flows,
    oracle,
    photographs,
    t5,
    tokenizer,
    unets,
    world,
)
from micro.training import Recipe, pick_device

RECIPES = {
    "oracle": Recipe(steps=2500, batch=64, lr=2e-3),
    "oracle-wide": Recipe(steps=250, batch=64, lr=1e-3, warmup=20, ema=0.98),
    "vae-crops": Recipe(steps=3500, batch=32, lr=1.5e-3, final_lr=0.3),
    "vae": Recipe(steps=1500, batch=12, lr=6e-4, warmup=50, final_lr=0.02),
    "movq": Recipe(steps=400, batch=16, lr=3e-4, warmup=50),
    "clip": Recipe(steps=2500, batch=128, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), ema=0.995),
    "prior": Recipe(steps=4000, batch=128, lr=1e-3),
    "decoder": Recipe(steps=6000, batch=64, lr=1e-3),
    "stable-diffusion": Recipe(steps=12000, batch=64, lr=1e-3),
    "autoencoder16-code": Recipe(steps=700, batch=32, lr=2e-3, final_lr=0.1, warmup=50),
    "autoencoder16-windows": Recipe(steps=3000, batch=24, lr=2e-3, final_lr=0.3),
    "autoencoder16": Recipe(steps=20000, batch=8, lr=1.2e-3, final_lr=0.02, warmup=100),
    "t5": Recipe(steps=2500, batch=256, lr=2e-3),
    "flux": Recipe(steps=12000, batch=64, lr=1e-3),
    "flux-guidance": Recipe(steps=2000, batch=64, lr=5e-4, warmup=50),
    "schnell": Recipe(steps=2000, batch=64, lr=5e-4, warmup=50),
    "sd3": Recipe(steps=12000, batch=64, lr=1e-3),
}
"""What the shipped weights aim at; ``--minutes`` shortens each in proportion on a slow machine."""
PHOTOGRAPHS = "pictures"
"""Folder in the work folder into which the packages that `micro.photographs` names are unpacked."""


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
    judge = oracle.train_oracle(work, recipes["oracle"])
    oracle.widen_oracle(judge, work, recipes["oracle-wide"]).save(work / "oracle")


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


def _own_or_shipped(work: Path, own: str, shipped: str) -> Path:
    return work / own if (work / own).exists() else MODELS / shipped


def _words(work: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    return (
        CLIPTokenizer.from_pretrained(_own_or_shipped(work, "tokenizer", "stable-diffusion/tokenizer")),
        T5Tokenizer.from_pretrained(work / "t5_tokenizer"),
    )


def _pooled(work: Path) -> CLIPTextModel:
    folder = _own_or_shipped(work, "sd_text_encoder", "stable-diffusion/text_encoder")
    return CLIPTextModel.from_pretrained(folder, dtype=torch.float32).eval()


def _aligned(work: Path) -> CLIPTextModelWithProjection:
    folder = _own_or_shipped(work, "text_encoder", "prior/text_encoder")
    return CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()


def _corpus(work: Path) -> flows.Corpus:
    vae = AutoencoderKL.from_pretrained(work / "autoencoder16").to(pick_device(), memory_format=torch.channels_last)
    pictures = data.split_pictures(work, "train", world.TRAIN_SIZE)
    make = lambda: autoencoder16.encode_scaled(vae, pictures).half().numpy()  # noqa: E731
    return flows.Corpus.load(work, data.cached(work / "latents16.npy", make), *_words(work))


def _autoencoder16(work: Path, recipes: dict[str, Recipe]) -> None:
    seen = autoencoder16.Pictures.load(work, work / PHOTOGRAPHS)
    parts = [recipes[name] for name in ("autoencoder16-code", "autoencoder16-windows", "autoencoder16")]
    autoencoder16.train_autoencoder(work, seen, *parts).save_pretrained(work / "autoencoder16")


def _flux(work: Path, recipes: dict[str, Recipe]) -> None:
    if not (work / "t5_tokenizer").exists():
        captions = data.split_captions(work, "train", world.TRAIN_SIZE, 6)
        t5.learn(captions.reshape(-1).tolist(), work / "t5_tokenizer")
    corpus = _corpus(work)
    torch.manual_seed(10)
    text = flows.FluxText(_pooled(work), t5.build(_words(work)[1]))
    start = flows.Flow(flows.build_flux(), text, corpus.pairings)
    flows.teach_text(start, corpus, recipes["t5"], work, seed=9)
    flow = flows.train_flow("flux", start, corpus, recipes["flux"], work, seed=10)
    flow = flows.embed_guidance("flux-guidance", flow, corpus, recipes["flux-guidance"], work, seed=11)
    flow.text.t5.save_pretrained(work / "t5")
    flow.transformer.save_pretrained(work / "flux")


def _t5(work: Path) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(work / "t5").eval().requires_grad_(False)


def _schnell(work: Path, recipes: dict[str, Recipe]) -> None:
    corpus = _corpus(work)
    flux = FluxTransformer2DModel.from_pretrained(work / "flux")
    teacher = flows.Flow(flux, flows.FluxText(_pooled(work), _t5(work)), corpus.pairings)
    few = flows.shorten("schnell", teacher, corpus, flows.TEACHING, recipes["schnell"], work, seed=12)
    few.transformer.save_pretrained(work / "schnell")


def _sd3(work: Path, recipes: dict[str, Recipe]) -> None:
    corpus = _corpus(work)
    torch.manual_seed(13)
    text = flows.SD3Text(_aligned(work), flows.pooling(_pooled(work)), _t5(work))
    flow = flows.Flow(flows.build_sd3(), text, corpus.pairings)
    flows.train_flow("sd3", flow, corpus, recipes["sd3"], work, seed=13).transformer.save_pretrained(work / "sd3")


STAGES: dict[str, tuple[str, Callable[[Path, dict[str, Recipe]], None]]] = {
    "oracle": ("oracle", _oracle),
    "vae": ("vae", _vae),
    "movq": ("movq", _movq),
    "clip": ("image_encoder", _clip),
    "prior": ("prior", _prior),
    "stable-diffusion": ("sd_unet", _stable_diffusion),
    "decoder": ("decoder", _decoder),
    "autoencoder16": ("autoencoder16", _autoencoder16),
    "flux": ("flux", _flux),
    "schnell": ("schnell", _schnell),
    "sd3": ("sd3", _sd3),
}
"""Stage -> (the folder in the work folder that says it is done, what does it)."""


def _flux_pipeline(work: Path, name: str) -> FluxPipeline:
    words, t5_words = _words(work)
    return assemble.flux(
        AutoencoderKL.from_pretrained(work / "autoencoder16"), _pooled(work), words, _t5(work), t5_words,
        FluxTransformer2DModel.from_pretrained(work / name),
    )  # fmt: skip


def _sd3_pipeline(work: Path) -> StableDiffusion3Pipeline:
    words, t5_words = _words(work)
    return assemble.sd3(
        AutoencoderKL.from_pretrained(work / "autoencoder16"), _aligned(work), flows.pooling(_pooled(work)), words,
        _t5(work), t5_words, SD3Transformer2DModel.from_pretrained(work / "sd3"),
    )  # fmt: skip


FLOWS: dict[str, tuple[str, Callable[[Path], DiffusionPipeline]]] = {
    "flux": ("flux", lambda work: _flux_pipeline(work, "flux")),
    "schnell": ("flux-schnell", lambda work: _flux_pipeline(work, "schnell")),
    "sd3": ("sd3", _sd3_pipeline),
}
"""Stage -> (the folder of its pipeline, what puts it together)."""


def assemble_all(work: Path, folder: Path) -> None:
    """Write the pipelines' folders and the oracle's from the trained parts."""
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
    for name, together in FLOWS.values():
        assemble.save(together(work), folder / name)
    oracle.Oracle.load(work / "oracle").save(folder / "oracle")


_PARTS = {
    "oracle": ("oracle", "oracle-wide"),
    "vae": ("vae-crops", "vae"),
    "autoencoder16": ("autoencoder16-code", "autoencoder16-windows", "autoencoder16"),
    "flux": ("t5", "flux", "flux-guidance"),
}
"""The recipes of a stage that has several; the others have one, of the stage's name."""


def bounded(minutes: float | None, only: str | None) -> dict[str, Recipe]:
    """The recipes, with ``minutes`` shared out by pictures among all, or among those of one stage."""
    names = RECIPES if only is None else _PARTS.get(only, (only,))
    recipes = {name: RECIPES[name] for name in names}
    if minutes is None:
        return recipes
    total = sum(r.steps * r.batch for r in recipes.values())
    return {name: replace(r, minutes=minutes * r.steps * r.batch / total) for name, r in recipes.items()}


def main() -> int:
    from micro import evaluate

    parser = argparse.ArgumentParser(prog="python -m micro.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("micro/work"), help="checkpoints and drawn pictures")
    parser.add_argument("--output", type=Path, default=MODELS, help="where the finished folders go")
    parser.add_argument("--minutes", type=float, help="bound on it all, shared out; with --only, on that model")
    parser.add_argument("--only", choices=STAGES, help="train one model, and stop; writes a flow model's folder")
    arguments = parser.parse_args()
    work, recipes = arguments.work, bounded(arguments.minutes, arguments.only)
    work.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "autoencoder16") and not (work / "autoencoder16").exists():
        try:
            photographs.files(work / PHOTOGRAPHS, "photograph", heldout=False)
        except FileNotFoundError as error:
            parser.error(str(error))
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
        if arguments.only in FLOWS:
            name, together = FLOWS[arguments.only]
            assemble.save(together(work), arguments.output / name)
        return 0
    assemble_all(work, arguments.output)
    return evaluate.run(arguments.output, card=True)


if __name__ == "__main__":
    sys.exit(main())
