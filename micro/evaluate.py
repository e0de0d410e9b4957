"""``python -m micro.evaluate``: what the shipped miniature models reach on held-out data, against what they must.

Prints one table and exits with 1 where a figure falls short. With ``--card`` it also draws the contact sheets of the
model card (`micro/README.md`) and writes the table into it. Everything is drawn from fixed seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)  # fmt: skip
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from micro import MODELS, assemble, autoencoder, clip, oracle, photographs, prompts, t5, world
from micro.training import pick_device, pictures_to_tensor

SHEETS = Path(__file__).parent / "sheets"
CARD = Path(__file__).parent / "README.md"
_STEPS = 25
_GUIDANCE = 4.0
_FLOWS = {"flux": ("FLUX", 20, 5.0), "flux-schnell": ("FLUX in four steps", 4, 0.0), "sd3": ("SD3", 20, 3.0)}
"""Folder -> name, steps, guidance."""

Draw = Callable[[Sequence[str], int], np.ndarray]
"""Draws a picture a prompt from a seed: (n, 64, 64, 3) uint8."""


@dataclass(frozen=True)
class Line:
    """One figure of the table; ``least`` is what it must reach (None: it is only reported)."""

    name: str
    value: float
    least: float | None = None

    @property
    def short(self) -> bool:
        return self.least is not None and not self.value >= self.least


@dataclass(frozen=True)
class Aims:
    """What a generator must reach on frequent single objects, and on two (None: it is only reported)."""

    color: float
    shape: float
    texture: float
    bound: float | None = None
    relation: float | None = None


KANDINSKY = Aims(0.90, 0.85, 0.75)
STABLE_DIFFUSION = Aims(0.90, 0.85, 0.75, bound=0.60, relation=0.70)
FLOW = Aims(0.95, 0.95, 0.90, bound=0.85)


def _heldout(count: int) -> tuple[np.ndarray, list[world.Scene]]:
    scenes = [world.sample_scene(i, "heldout") for i in range(count)]
    return np.stack([world.render(scene) for scene in scenes]), scenes


def _to_uint8(x_BCHW: torch.Tensor) -> np.ndarray:
    return ((x_BCHW.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def _degraded(pictures: np.ndarray, kind: str, vae: AutoencoderKL) -> np.ndarray:
    x = pictures_to_tensor(pictures, torch.device("cpu"))
    if kind == "noise":
        x = x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    elif kind == "blur":
        import torch.nn.functional as F

        taps = torch.exp(-(torch.arange(-3, 4, dtype=torch.float32) ** 2) / 2)
        taps = taps / taps.sum()
        x = F.conv2d(x, taps.view(1, 1, 1, 7).repeat(3, 1, 1, 1), padding=(0, 3), groups=3)
        x = F.conv2d(x, taps.view(1, 1, 7, 1).repeat(3, 1, 1, 1), padding=(3, 0), groups=3)
    else:
        z = autoencoder.encode_all(vae, pictures)
        with torch.no_grad():
            x = torch.cat([vae.decode(part).sample for part in z.split(50)])
    return _to_uint8(x)


def judge_oracle(judge: oracle.Oracle, vae: AutoencoderKL, count: int) -> list[Line]:
    pictures, scenes = _heldout(count)
    least = {"color": 0.99, "shape": 0.98, "texture": 0.97, "relation": 0.98}
    clean = oracle.accuracy(judge, pictures, scenes)
    lines = [Line(f"oracle, held-out: {name}", value, least.get(name)) for name, value in clean.items()]
    for kind in ("blur", "noise", "vae"):
        part = min(count, 500)
        found = oracle.accuracy(judge, _degraded(pictures[:part], kind, vae), scenes[:part])
        lines += [Line(f"oracle, {kind}: {name}", found[name]) for name in least]
    return [
        *lines,
        *(Line(f"oracle, one {kind} object: all of it", _read_right(judge, kind), 0.95) for kind in UNUSUAL),
    ]


UNUSUAL = ("rare", "never")


def _read_right(judge: oracle.Oracle, kind: str, each: int = 20) -> float:
    """Share of rendered pictures of one object, all combinations of a kind alike, that are read as what they are."""
    combos = [combo for combo in world.combinations(kind) for _ in range(each)]
    scenes = [world.compose(np.random.default_rng([29, n]), [combo]) for n, combo in enumerate(combos)]
    readings = judge.read(np.stack([world.render(scene) for scene in scenes]))
    asked = [[dict(zip(("shape", "color", "texture"), combo, strict=True))] for combo in combos]
    return float(np.mean([oracle.score(found, one).success for found, one in zip(readings, asked, strict=True)]))


def judge_clip(
    image: CLIPVisionModelWithProjection, text: CLIPTextModelWithProjection, words: CLIPTokenizer, count: int = 500
) -> list[Line]:
    """Retrieval among pictures with distinct full captions, and the geometry of the two cones."""
    chosen: dict[str, int] = {}
    index = 0
    while len(chosen) < count:
        chosen.setdefault(world.caption_of(index, "heldout", detail="full"), index)
        index += 1
    pictures = np.stack([world.picture(i, "heldout") for i in chosen.values()])
    seen = clip.embed_pictures(image, pictures)
    full = clip.geometry(seen, clip.embed_tokens(text, clip.tokenize_all(words, np.array(list(chosen)))))
    varied = np.array([world.caption_of(i, "heldout", wording=0) for i in chosen.values()])
    brief = clip.geometry(seen, clip.embed_tokens(text, clip.tokenize_all(words, varied)))
    lines = [Line(f"CLIP, full captions: text-to-image R@1 of {count}", full.pop("text_to_image_r1"), 0.70)]
    lines += [Line(f"CLIP, full captions: {name}", value) for name, value in full.items()]
    return [*lines, Line(f"CLIP, varied captions: text-to-image R@1 of {count}", brief["text_to_image_r1"])]


def draw_with_kandinsky(prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline) -> Draw:
    def draw(texts: Sequence[str], seed: int) -> np.ndarray:
        out = []
        for i in range(0, len(texts), 50):
            part = list(texts[i : i + 50])
            generators = [torch.Generator().manual_seed(seed * 100_003 + i + k) for k in range(len(part))]
            embeds = prior(part, num_inference_steps=_STEPS, guidance_scale=_GUIDANCE, generator=generators)
            drawn = decoder(image_embeds=embeds.image_embeds, negative_image_embeds=embeds.negative_image_embeds,
                            height=64, width=64, num_inference_steps=_STEPS, guidance_scale=_GUIDANCE,
                            generator=generators, output_type="np")  # fmt: skip
            out.append((np.stack(drawn.images) * 255).round().astype(np.uint8))
        return np.concatenate(out)

    return draw


def draw_with_stable_diffusion(pipeline: StableDiffusionPipeline) -> Draw:
    return _draw_with(pipeline, num_inference_steps=_STEPS, guidance_scale=_GUIDANCE)


def draw_with_flow(pipeline: FluxPipeline | StableDiffusion3Pipeline, steps: int, guidance: float) -> Draw:
    return _draw_with(pipeline, num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=t5.LENGTH)


def _draw_with(pipeline: Any, **options: Any) -> Draw:
    def draw(texts: Sequence[str], seed: int) -> np.ndarray:
        out = []
        for i in range(0, len(texts), 50):
            part = list(texts[i : i + 50])
            generators = [torch.Generator().manual_seed(seed * 100_003 + i + k) for k in range(len(part))]
            drawn = pipeline(part, height=64, width=64, generator=generators, output_type="np", **options)
            out.append((drawn.images * 255).round().astype(np.uint8))
        return np.concatenate(out)

    return draw


def _attribute_rates(judge: oracle.Oracle, asked: Sequence[prompts.Prompt], pictures: np.ndarray) -> dict[str, float]:
    """Shares of single-object pictures in which some object has the asked colour, shape, texture, and all of them."""
    hits: dict[str, list[bool]] = {"color": [], "shape": [], "texture": [], "success": []}
    for prompt, reading in zip(asked, judge.read(pictures), strict=True):
        wanted = prompt.objects[0]
        first = reading.things[0] if reading.things else None
        for field in ("color", "shape", "texture"):
            hits[field].append(first is not None and getattr(first, field) == wanted[field])
        hits["success"].append(oracle.score(reading, prompt.objects).success)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def judge_generation(name: str, draw: Draw, judge: oracle.Oracle, count: int, aims: Aims) -> list[Line]:
    """Attributes of single objects by rarity, and both colours and the relation of two objects."""
    lines = []
    least = {"color": aims.color, "shape": aims.shape, "texture": aims.texture}
    for kind in ("single", "rare", "never"):
        asked = prompts.load(kind)[:count]
        rates = _attribute_rates(judge, asked, draw([p.prompt for p in asked], 1))
        wanted = least if kind == "single" else {}
        label = {"single": "frequent"}.get(kind, kind)
        lines += [Line(f"{name}, one object, {label}: {k}", rate, wanted.get(k)) for k, rate in rates.items()]
    asked = prompts.load("spatial")[:count]
    readings = judge.read(draw([p.prompt for p in asked], 2))
    scores = [oracle.score(r, p.objects, p.relation) for r, p in zip(readings, asked, strict=True)]
    colours = [oracle.score(r, [{"color": o["color"]} for o in p.objects]).bound == 1 and
               oracle.score(r, p.objects).bound == 1 for r, p in zip(readings, asked, strict=True)]  # fmt: skip
    placed = [_relation_by_colour(r, p) for r, p in zip(readings, asked, strict=True)]
    lines.append(Line(f"{name}, two objects: both colours bound", float(np.mean(colours)), aims.bound))
    found = [p for p in placed if p is not None]
    lines.append(Line(f"{name}, two objects: relation right where both are found", float(np.mean(found or [False])),
                      aims.relation))  # fmt: skip
    lines.append(Line(f"{name}, two objects: all asked", float(np.mean([s.success for s in scores]))))
    return lines


def _relation_by_colour(reading: oracle.Reading, prompt: prompts.Prompt) -> bool | None:
    """Whether the two things with the asked colours stand as asked; None where one is missing."""
    first, second = (next((t for t in reading.things if t.color == o["color"]), None) for o in prompt.objects)
    if first is None or second is None:
        return None
    return world.relation_of(first, second) == prompt.relation


# --- contact sheets -----------------------------------------------------------------------------------------------


def _sheet(pictures: np.ndarray, columns: int, path: Path) -> None:
    rows = len(pictures) // columns
    grid = pictures[: rows * columns].reshape(rows, columns, 64, 64, 3)
    grid = np.pad(grid, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    flat = grid.transpose(0, 2, 1, 3, 4).reshape(rows * 68, columns * 68, 3)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(flat).save(path, optimize=True)


def draw_sheets(vae: AutoencoderKL, kandinsky: Draw, stable: Draw) -> None:
    """World pictures, reconstructions under originals, and both generators on the same prompts."""
    pictures, _ = _heldout(48)
    _sheet(pictures, 12, SHEETS / "world.png")
    _sheet(np.concatenate([pictures[:12], _degraded(pictures[:12], "vae", vae)]), 12, SHEETS / "vae.png")
    texts = [p.prompt for kind in ("single", "spatial", "numeracy", "complex", "rare", "never")
             for p in prompts.load(kind)[:8]]  # fmt: skip
    _sheet(kandinsky(texts, 3), 8, SHEETS / "kandinsky.png")
    _sheet(stable(texts, 3), 8, SHEETS / "stable-diffusion.png")
    (SHEETS / "prompts.txt").write_text("\n".join(texts) + "\n")


# --- the table ----------------------------------------------------------------------------------------------------


def write_card(lines: Sequence[Line], count: int) -> None:
    """Replace the table between the two marks of the model card."""
    said = [f"`python -m micro.evaluate --count {count} --card` wrote this.", ""]
    said += ["| figure | value | at least | reached |", "|---|---|---|---|"]
    for x in lines:
        reached = "" if x.least is None else f"**no**, {x.least - x.value:.2f} short" if x.short else "yes"
        said.append(f"| {x.name} | {x.value:.3f} | {'' if x.least is None else f'{x.least:.2f}'} | {reached} |")
    before, start, rest = CARD.read_text().partition("<!-- figures -->\n")
    _, end, after = rest.partition("<!-- end of figures -->")
    CARD.write_text(before + start + "\n".join(said) + "\n\n" + end + after)


def judge_flow(folder: Path, name: str, judge: oracle.Oracle, count: int) -> list[Line]:
    """What one of the flow models draws, and what its autoencoder keeps of the world."""
    said, steps, guidance = _FLOWS[name]
    pipeline = assemble.load(name, folder / name, str(pick_device()))
    kept = autoencoder.psnr_of(pipeline.vae, _heldout(count)[0])
    return [
        Line(f"{said}: autoencoder, world, dB PSNR", kept, 34.0),
        *judge_generation(said, draw_with_flow(pipeline, steps, guidance), judge, count, FLOW),
    ]


def judge_photographs(folder: Path, work: Path) -> Line:
    """What the flow models' autoencoder keeps of photographs that it has not learned from.

    Args:
        work: Where the packages that `micro.photographs` names are unpacked.
    """
    paths = photographs.files(work, "photograph", heldout=True)
    pictures = np.concatenate([photographs.crops(path, 24) for path in paths])
    vae = assemble.load("flux", folder / "flux").vae
    return Line("flow models' autoencoder, photographs, dB PSNR", autoencoder.psnr_of(vae, pictures), 26.0)


def run(folder: Path, count: int = 300, card: bool = False, photos: Path | None = None) -> int:
    """Judge the models in ``folder``, print the table, write ``metrics.json`` beside them; 1 where one falls short."""
    prior, decoder = assemble.load("prior", folder / "prior"), assemble.load("decoder", folder / "decoder")
    stable = assemble.load("stable-diffusion", folder / "stable-diffusion")
    judge = oracle.Oracle.load(folder / "oracle")
    pictures, _ = _heldout(count)
    kandinsky, diffusion = draw_with_kandinsky(prior, decoder), draw_with_stable_diffusion(stable)
    lines = [
        Line("VAE reconstruction, dB PSNR", autoencoder.psnr_of(stable.vae, pictures), 30.0),
        Line("MOVQ reconstruction, dB PSNR", autoencoder.psnr_of(decoder.movq, pictures), 30.0),
        *judge_oracle(judge, stable.vae, 2000),
        *judge_clip(prior.image_encoder, prior.text_encoder, prior.tokenizer),
        *judge_generation("prior + decoder", kandinsky, judge, count, KANDINSKY),
        *judge_generation("Stable Diffusion", diffusion, judge, count, STABLE_DIFFUSION),
        *(line for name in _FLOWS if (folder / name).exists() for line in judge_flow(folder, name, judge, count)),
    ]
    if photos:
        lines.append(judge_photographs(folder, photos))
    if card:
        draw_sheets(stable.vae, kandinsky, diffusion)
        write_card(lines, count)
    _write_figures(folder, lines)
    return _told(lines)


def run_one(folder: Path, name: str, count: int, card: bool) -> int:
    """Judge one of the flow models in ``folder``; with ``card`` its figures replace those that the card has of it."""
    lines = judge_flow(folder, name, oracle.Oracle.load(folder / "oracle"), count)
    if card:
        before = [Line(**figure) for figure in json.loads((folder / "metrics.json").read_text())]
        whole = list({line.name: line for line in (*before, *lines)}.values())  # each in its place
        write_card(whole, count)
        _write_figures(folder, whole)
    return _told(lines)


def _write_figures(folder: Path, lines: Sequence[Line]) -> None:
    figures = [{"name": x.name, "value": round(x.value, 4), "least": x.least} for x in lines]
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")


def _told(lines: Sequence[Line]) -> int:
    """Print the table; 1 where a figure falls short."""
    width = max(len(line.name) for line in lines)
    for line in lines:
        least = "" if line.least is None else f"  >= {line.least:.2f}  {'SHORT' if line.short else 'ok'}"
        print(f"{line.name:{width}}  {line.value:7.3f}{least}")
    short = [line.name for line in lines if line.short]
    print(f"{len(short)} of {sum(line.least is not None for line in lines)} figures fall short"
          + (": " + "; ".join(short) if short else ""))  # fmt: skip
    return 1 if short else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m micro.evaluate", description=__doc__)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--count", type=int, default=300, help="prompts and pictures a figure")
    parser.add_argument("--card", action="store_true", help="also draw the contact sheets, and fill in the model card")
    parser.add_argument("--photographs", type=Path, help="where the packages of micro/photographs.py are unpacked")
    parser.add_argument("--only", choices=_FLOWS, help="judge one flow model; with --card its figures alone are new")
    arguments = parser.parse_args()
    try:
        if arguments.only:
            return run_one(arguments.models, arguments.only, arguments.count, arguments.card)
        return run(arguments.models, arguments.count, arguments.card, arguments.photographs)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
