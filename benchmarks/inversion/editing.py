"""Editing as a check of use: invert a picture under its caption, regenerate it under a caption with one word changed.

    python -m benchmarks.inversion.editing [--pictures 48] [--steps 20] [--guidances 1 2 4]

The oracle of the miniature world judges: has the named attribute changed, and did shape, the other attribute, place
(within 6 pixels) and background stay? ``random seed`` draws the new caption from a seed that knows nothing of the
picture. Plain regeneration only: no attention control, no blending. Writes results/editing.json and .md beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import micro
from micro import world
from micro.oracle import Oracle, Reading
from stages.engine.randomness import row_normal
from stages.inversion.settings import DdimMethod, FixedPointMethod, InvertImagesSettings, LboMethod, RenoiseMethod
from stages.inversion.stage import InvertImages
from stages.models.pictures import to_picture
from stages.models.sampler import sample

RESULTS = Path(__file__).parent / "results"
MODEL = str(micro.MODELS / "stable-diffusion")
METHODS = (DdimMethod(), RenoiseMethod(), FixedPointMethod(), LboMethod())
CHECKS = ("changed", "shape", "other", "place", "background", "all")


def edits(count: int) -> list[dict[str, Any]]:
    """Pictures of one object, half to change their colour, half their texture; every wording is a full caption."""
    rows = []
    frequent = world.combinations("frequent")
    for index in range(count):
        rng = np.random.default_rng([20, index])
        field = ("color", "texture")[index % 2]
        shape, color, texture = frequent[rng.integers(len(frequent))]
        wanted = [c for c in frequent if c[0] == shape and (c[2] == texture if field == "color" else c[1] == color)]
        wanted = [c for c in wanted if c != (shape, color, texture)]
        target = wanted[rng.integers(len(wanted))]
        scene = world.compose(rng, [(shape, color, texture)], sizes=["large"])
        (thing,) = scene.things
        other = world.Scene((world.Thing(*target, thing.size, thing.x, thing.y, thing.r),), scene.background)
        rows.append(
            {
                "id": f"edit-{index}", "image": Image.fromarray(world.render(scene)), "scene": scene, "field": field,
                "prompt": world.caption(scene, rng, "full"), "edit_prompt": world.caption(other, rng, "full"),
                "target": other.things[0],
            }
        )  # fmt: skip
    return rows


def judge(row: dict[str, Any], reading: Reading) -> dict[str, bool]:
    target = row["target"]
    kept = "texture" if row["field"] == "color" else "color"
    nearest = min(reading.things, key=lambda t: (t.x - target.x) ** 2 + (t.y - target.y) ** 2, default=None)
    if nearest is None:
        return dict.fromkeys(CHECKS, False)
    found = {
        "changed": getattr(nearest, row["field"]) == getattr(target, row["field"]),
        "shape": nearest.shape == target.shape,
        "other": getattr(nearest, kept) == getattr(target, kept),
        "place": bool(np.hypot(nearest.x - target.x, nearest.y - target.y) <= 6) and len(reading.things) == 1,
        "background": reading.background == row["scene"].background,
    }
    return {**found, "all": all(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder; left out: the shipped miniature")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    oracle, rows = Oracle.load(), edits(options.pictures)
    results: dict[str, dict[str, float]] = {}
    for guidance in options.guidances:
        settings = InvertImagesSettings(
            model=options.model or MODEL, methods=METHODS, device="cpu", steps=options.steps, pictures=False,
            edit_guidance=guidance,
        )  # fmt: skip
        stage = InvertImages(settings)
        asked = [{**row, "id": f"{row['id']}/{m.label}", "method": m.label} for row in rows for m in METHODS]
        done = {row["id"]: row["edited"] for row in stage(asked)}
        latents = row_normal(stage.geometry.latent_shape, 1, [row["id"] for row in rows], "seed")
        done |= {f"{r['id']}/random seed": p for r, p in zip(rows, draw(stage, rows, latents, guidance), strict=True)}
        for label in (*(m.label for m in METHODS), "random seed"):
            readings = oracle.read([done[f"{row['id']}/{label}"] for row in rows])
            seen = [judge(row, reading) for row, reading in zip(rows, readings, strict=True)]
            shares = {name: float(np.mean([s[name] for s in seen])) for name in CHECKS}
            results[f"{label}, guidance {guidance:g}"] = shares
            print(label, guidance, json.dumps(shares), flush=True)
    lines = ["| inverted by, regenerated at | " + " | ".join(CHECKS) + " |", "|" + "---|" * (len(CHECKS) + 1)]
    lines += [f"| {label} | " + " | ".join(f"{r[name]:.2f}" for name in CHECKS) + " |" for label, r in results.items()]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "editing.json").write_text(json.dumps({"settings": vars(options), "results": results}, indent=1))
    (RESULTS / "editing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def draw(stage: InvertImages, rows: list[dict[str, Any]], latents: torch.Tensor, guidance: float) -> list[Image.Image]:
    """The new captions from given noise."""
    condition = stage.model.condition([row["edit_prompt"] for row in rows], guided=guidance > 1)
    schedule = stage.model.schedule(stage.settings.steps)
    z_BCHW = sample(stage.model.predictor(guidance), schedule, latents, condition)
    with torch.no_grad():
        return [to_picture(picture) for picture in stage.model.decode(z_BCHW)]


if __name__ == "__main__":
    main()
