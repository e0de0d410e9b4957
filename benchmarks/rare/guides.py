"""Rare and never-seen combinations of the miniature world: methods of new seeds x guides, cell by cell.

Nothing is selected (one candidate a picture); the oracle judges. A cell that benchmarks/rare/results/guides.json holds
already is not measured again, so that the table grows a slice of time at a time. Prints the table; writes guides.md.

    python -m benchmarks.rare.guides [--cells random:plain random:aapb] [--kinds never rare] [--limit 500]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import micro
from benchmarks.rare.rare_concepts import concepts, spread
from micro import prompts, world
from stages.inversion.settings import DdimMethod, LboMethod
from stages.models.fingerprint import describe_model
from stages.rare.settings import (
    AapbGuide,
    AnyGuide,
    AnyNoiseMethod,
    Blend,
    ComposeGuide,
    LinearMethod,
    NaoMethod,
    PlainGuide,
    R2fGuide,
    RandomMethod,
    RareConceptsSettings,
    SlerpMethod,
)
from stages.rare.stage import RareConcepts

RESULTS = Path(__file__).parent / "results"
METHODS: tuple[AnyNoiseMethod, ...] = (
    RandomMethod(),
    SlerpMethod(),
    LinearMethod(),
    NaoMethod(),
    NaoMethod(name="nao-low", blend=Blend(low=0.25)),
)
GUIDES: tuple[AnyGuide, ...] = (
    PlainGuide(),
    R2fGuide(until=0.3),
    R2fGuide(name="r2f-all-first", until=0.2, every=1),
    AapbGuide(),
    ComposeGuide(name="compose-half", weight=0.5),
    ComposeGuide(),
)
CELLS = (
    "random:plain", "random:aapb", "random:compose-half", "random:r2f", "nao-low:plain", "nao:plain", "nao-low:aapb",
    "nao:aapb", "random:compose", "random:r2f-all-first", "slerp:aapb", "linear:aapb",
)  # fmt: skip
"""The most telling ones first."""
COPY_DB = 25.0
"""A picture nearer than this to one of the concept's own, by PSNR, is called a copy."""
STAND_IN = {"heart": "circle", "moon": "circle", "star": "cross", "ring": "circle"}
"""A shape that training pictures hold in every colour and texture, for each that they do not."""
USUAL = {"heart": "red", "moon": "blue"}
"""A colour that training pictures hold it in."""


def frequent_texts(asked: dict[str, str]) -> dict[str, Any]:
    """Anchor and parts of a combination, all of what training pictures hold often.

    The anchor keeps colour and texture and changes the shape. Parts: what its colour and texture change in another
    shape, and what its shape changes in a usual colour.
    """
    shape, colour, texture = (asked[field] for field in ("shape", "color", "texture"))
    other, usual = STAND_IN[shape], USUAL.get(shape, colour)
    known = texture if world.rarity(shape, usual, texture) == "frequent" else "plain"
    attributes = [_a(other, colour, texture), _a(other, usual, known)]
    outline = [_a(shape, usual, known), _a(other, usual, known)]
    assert world.rarity(other, colour, texture) == world.rarity(shape, usual, known) == "frequent"
    return {"anchor": attributes[0], "parts": [pair for pair in (attributes, outline) if pair[0] != pair[1]]}


def _a(shape: str, colour: str, texture: str) -> str:
    return prompts._a({"shape": shape, "color": colour, "texture": texture})


def rows(options: argparse.Namespace, kind: str, method: str, guide: str) -> list[dict[str, Any]]:
    return [
        {
            **concept, **frequent_texts(concept["objects"][0]), "method": method, "guide": guide, "number": str(number),
            "id": f"{concept['name']}/{method}/{guide}/{number}",
        }
        for concept in concepts(kind, options.concepts, options.shown)
        for number in range(options.pictures)
    ]  # fmt: skip


def passes(guide: AnyGuide, steps: int) -> int:
    """U-Net passes of a picture, of one row each."""
    return steps * {PlainGuide: 2, R2fGuide: 2, AapbGuide: 3, ComposeGuide: 6}[type(guide)]


def interval(shares: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over concepts, which are what is drawn at random."""
    drawn = np.random.default_rng(0).choice(shares, (4000, len(shares))).mean(1)
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def copies(done: list[dict[str, Any]], shown: dict[str, list[np.ndarray]]) -> float:
    """Share of the pictures that copy one of their concept's own."""
    found = []
    for row in done:
        picture = np.asarray(row["image"], dtype=np.float64)
        errors = [np.square(picture - own).mean() for own in shown[row["concept"]]]
        found.append(10 * np.log10(255**2 / max(min(errors), 1e-9)) > COPY_DB)
    return float(np.mean(found))


def measure(options: argparse.Namespace, kind: str, method: AnyNoiseMethod, guide: AnyGuide) -> dict[str, Any]:
    """One cell."""
    stage = RareConcepts(RareConceptsSettings(
        model=options.model, methods=(method,), guides=(guide,), steps=options.steps, guidance=options.guidance,
        scores=("text", "image", "oracle"), slots=options.slots, device="cpu", seed=options.seed,
        inversion=DdimMethod() if isinstance(method, RandomMethod) else LboMethod(),  # random takes no seed of it
    ))  # fmt: skip
    begun, given = time.process_time(), rows(options, kind, method.label, guide.label)
    done = list(stage(given))
    bad = [row["error"] for row in done if row["status"] != "ok"]
    if bad:
        raise SystemExit(f"{kind} {method.label}:{guide.label}: {len(bad)} rows failed: {bad[0]}")
    by_concept: dict[str, list[bool]] = {}
    for row in done:
        by_concept.setdefault(row["concept"], []).append(bool(row["success"]))
    shares = {name: float(np.mean(own)) for name, own in by_concept.items()}
    shown = {row["name"]: [np.asarray(one, dtype=np.float64) for one in row["pictures"]] for row in given}
    success = float(np.mean(list(shares.values())))
    return {
        "rows": len(done), "success": success, "interval": interval(list(shares.values())), "by_concept": shares,
        "clip_score": float(np.mean([row["clip_score"] for row in done])),
        "clip_image": float(np.mean([row["clip_image"] for row in done])),
        "copies": copies(done, shown), "spread": spread(done), "passes": passes(guide, options.steps),
        "passes_a_success": passes(guide, options.steps) / success if success else None,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    setting = found["setting"]
    head = ["combinations", "seeds", "guide", "pictures", "success by the oracle", "95 %, by concept", "CLIP text",
            "CLIP image", "copies", "spread of pixels", "passes a picture", "a success"]  # fmt: skip
    described = (
        f"{setting['concepts']} concepts a kind, {setting['shown']} pictures of each (inverted by lbo, but for "
        f"random), {setting['steps']} steps, guidance {setting['guidance']:g}, nothing selected. Shipped weights, "
        f"U-Net {found['unet'][:12]}."
    )
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines = ["# Rare concepts: seeds x guides", "", described, "", *table]
    for name, row in found["cells"].items():
        kind, method, guide = name.split(":")
        low, high = row["interval"]
        dear = "" if row["passes_a_success"] is None else f"{row['passes_a_success']:.0f}"
        lines.append(
            f"| {kind} | {method} | {guide} | {row['rows']} | {row['success']:.3f} | {low:.2f} - {high:.2f} | "
            f"{row['clip_score']:.1f} | {row['clip_image']:.1f} | {row['copies']:.2f} | {row['spread']:.1f} | "
            f"{row['passes']} | {dear} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(micro.MODELS / "stable-diffusion"))
    parser.add_argument("--kinds", nargs="+", default=["never", "rare"], choices=["rare", "never"])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="method:guide")
    parser.add_argument("--concepts", type=int, default=8, help="a kind")
    parser.add_argument("--pictures", type=int, default=6, help="a concept and cell")
    parser.add_argument("--shown", type=int, default=4, help="pictures of each concept that are inverted")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=float("inf"), help="no cell is begun after so many seconds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = {name: getattr(options, name) for name in ("concepts", "pictures", "shown", "steps", "guidance", "seed")}
    file, unet = options.output / "guides.json", describe_model(options.model, None, "unet")["fingerprint"]
    found = json.loads(file.read_text()) if file.exists() else {"setting": setting, "unet": unet, "cells": {}}
    if (found["setting"], found["unet"]) != (setting, unet):
        raise SystemExit(
            f"{file} was measured otherwise ({found['setting']}, U-Net {found['unet'][:12]}): name another"
        )
    begun = time.monotonic()
    for cell in options.cells:
        method = next(one for one in METHODS if one.label == cell.split(":")[0])
        guide = next(one for one in GUIDES if one.label == cell.split(":")[1])
        for kind in options.kinds:
            if f"{kind}:{cell}" in found["cells"] or time.monotonic() - begun > options.limit:
                continue
            found["cells"][f"{kind}:{cell}"] = measure(options, kind, method, guide)
            options.output.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
            (options.output / "guides.md").write_text(markdown(found))
            print(kind, cell, found["cells"][f"{kind}:{cell}"]["success"], flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
