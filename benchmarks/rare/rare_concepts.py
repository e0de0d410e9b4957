"""Rare and never-seen combinations of the miniature world: how often new seeds draw them by each method.

Every method grows its seeds from the same few inverted pictures of each concept; nothing is selected (one candidate a
picture); the oracle judges. Writes benchmarks/rare/results/rare_concepts.json and .md, and prints the table.

    python -m benchmarks.rare.rare_concepts [--concepts 8] [--pictures 10] [--select-pictures 3] [--methods nao ...]
    python -m benchmarks.rare.rare_concepts --tree jobs/examples/rare-concepts   # the folder of concepts again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import micro
from micro import prompts, world
from stages.models.fingerprint import describe_model
from stages.rare.settings import (
    AnyNoiseMethod,
    LinearMethod,
    NaoMethod,
    RandomMethod,
    RareConceptsSettings,
    SeedSelectMethod,
    SlerpMethod,
)
from stages.rare.stage import RareConcepts

RESULTS = Path(__file__).parent / "results"


def methods(steps: int) -> tuple[AnyNoiseMethod, ...]:
    """The methods of the table; `steps` are the sampling steps inside seed-select."""
    return (
        RandomMethod(),
        SlerpMethod(),
        LinearMethod(),
        NaoMethod(),
        SeedSelectMethod(steps=steps),
        SeedSelectMethod(name="seed-select-nao", start="nao", steps=steps),
    )


def concepts(kind: str, count: int, shown: int) -> Iterator[dict[str, Any]]:
    """The first distinct combinations of a prompt set, each with pictures of one such object, drawn anew."""
    seen: set[str] = set()
    for prompt in prompts.load(kind):
        (asked,) = prompt.objects
        name = "-".join(asked[field] for field in ("texture", "color", "shape"))
        if name in seen or len(seen) == count:
            continue
        seen.add(name)
        combo = (asked["shape"], asked["color"], asked["texture"])
        number = world.combinations(kind).index(combo)
        scenes = (world.compose(np.random.default_rng([17, number, picture]), [combo]) for picture in range(shown))
        pictures = [Image.fromarray(world.render(scene)) for scene in scenes]
        yield {"name": name, "prompt": prompt.prompt, "objects": [asked], "pictures": pictures}


def passes(method: AnyNoiseMethod, options: argparse.Namespace) -> int:
    """U-Net passes that a picture takes beyond the inversion; guidance doubles them, a backward pass counts as one."""
    drawn = 2 * options.steps
    if not isinstance(method, SeedSelectMethod):
        return drawn
    # Forward, forward again on the way back, backward.
    return drawn + method.budget[0] * 2 * options.select_steps * 3


def pictures_of(method: AnyNoiseMethod, options: argparse.Namespace) -> int:
    """Pictures a concept: fewer by the method that optimises every seed from noise."""
    from_noise = isinstance(method, SeedSelectMethod) and method.start == "random"
    return min(options.pictures, options.select_pictures) if from_noise else int(options.pictures)


def rows(given: list[dict[str, Any]], label: str, pictures: int) -> list[dict[str, Any]]:
    return [
        {**concept, "id": f"{concept['name']}/{label}/{number}", "method": label, "number": str(number)}
        for concept in given
        for number in range(pictures)
    ]


def interval(share: float, count: int) -> float:
    """Half of the 95 % confidence interval of a share (Wilson's, which is not zero at 0 or 1)."""
    z = 1.96
    return z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known after each kind."""
    torch.set_num_threads(options.threads)
    chosen = [m for m in methods(options.select_steps) if not options.methods or m.label in options.methods]
    settings = RareConceptsSettings(
        model=options.model, methods=tuple(chosen), steps=options.steps, guidance=options.guidance,
        scores=("text", "image", "oracle"), slots=options.slots, device="cpu", seed=options.seed,
    )  # fmt: skip
    stage = RareConcepts(settings)
    found: dict[str, Any] = {
        "setting": {key: getattr(options, key) for key in ("concepts", "pictures", "select_pictures", "shown", "steps",
                                                            "guidance", "select_steps", "seed")},
        "unet": describe_model(options.model, None, "unet")["fingerprint"],
        "tables": {},
    }  # fmt: skip
    for kind in options.kinds:
        given = list(concepts(kind, options.concepts, options.shown))
        table = found["tables"].setdefault(kind, {})
        # In one call, so that the concepts' pictures are inverted once.
        made = list(stage([r for m in chosen for r in rows(given, m.label, pictures_of(m, options))]))
        bad = [row["error"] for row in made if row["status"] != "ok"]
        if bad:
            raise SystemExit(f"{kind}: {len(bad)} rows failed: {bad[0]}")
        for method in chosen:
            table[method.label] = summary([row for row in made if row["method"] == method.label])
            table[method.label]["passes"] = passes(method, options)
            print(kind, method.label, table[method.label], flush=True)
        yield found


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over one method's rows."""
    share = float(np.mean([row["success"] for row in done]))
    names = ("clip_score", "clip_image", "seed_std", "seed_kurtosis", "seed_autocorrelation", "select_start",
             "select_loss")  # fmt: skip
    return {
        "rows": len(done),
        "success": share,
        "half": interval(share, len(done)),
        "concepts_with_one": len({row["concept"] for row in done if row["success"]}),
        **{name: float(np.mean([row[name] for row in done])) for name in names if name in done[0]},
        "spread": spread(done),
    }


def spread(done: list[dict[str, Any]]) -> float:
    """How much the pictures of a concept differ: mean deviation of a pixel over its pictures, of 255."""
    by_concept: dict[str, list[np.ndarray]] = {}
    for row in done:
        by_concept.setdefault(row["concept"], []).append(np.asarray(row["image"], dtype=np.float32))
    return float(np.mean([np.stack(own).std(0).mean() for own in by_concept.values()]))


def markdown(found: dict[str, Any]) -> str:
    setting = found["setting"]
    lines = [
        "# Rare concepts by method of new seeds", "",
        f"{setting['concepts']} concepts a kind, {setting['shown']} pictures of each inverted (lbo), "
        f"{setting['steps']} steps, guidance {setting['guidance']:g}, nothing selected; seed-select optimises through "
        f"{setting['select_steps']} steps. Shipped weights, U-Net {found['unet'][:12]}.",
    ]  # fmt: skip
    for kind, table in found["tables"].items():
        head = ["method", "pictures", "success by the oracle", "concepts drawn at all", "CLIP text", "CLIP image",
                "seed std", "seed autocorr.", "spread of pixels", "passes"]  # fmt: skip
        lines += ["", f"## {kind}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for label, row in table.items():
            lines.append(
                f"| {label} | {row['rows']} | {row['success']:.3f} ± {row['half']:.3f} | {row['concepts_with_one']} of "
                f"{setting['concepts']} | {row['clip_score']:.1f} | {row['clip_image']:.1f} | {row['seed_std']:.3f} | "
                f"{row['seed_autocorrelation']:.3f} | {row['spread']:.1f} | {row['passes']} |"
            )
    return "\n".join(lines) + "\n"


def write_tree(folder: Path, each: int, shown: int) -> None:
    """Concepts of both kinds as the folder tree that a job reads."""
    for kind in ("rare", "never"):
        for concept in concepts(kind, each, shown):
            own = folder / concept["name"]
            (own / "with").mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(concept["pictures"]):
                picture.save(own / "with" / f"{number}.png", optimize=True)
            (own / "concept.yaml").write_text(
                f"# Seen {'five times' if kind == 'rare' else 'not once'} in training.\n"
                f"prompt: {concept['prompt']}\nobjects: {json.dumps(concept['objects'])}\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(micro.MODELS / "stable-diffusion"))
    parser.add_argument("--kinds", nargs="+", default=["rare", "never"], choices=["rare", "never"])
    parser.add_argument("--concepts", type=int, default=8, help="a kind")
    parser.add_argument("--pictures", type=int, default=10, help="a concept and method")
    parser.add_argument("--select-pictures", type=int, default=3, help="a concept, by seed-select from random seeds")
    parser.add_argument("--shown", type=int, default=4, help="pictures of each concept that are inverted")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--select-steps", type=int, default=6, help="sampling steps inside seed-select")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tree", type=Path, help="write the folder of concepts instead")
    options = parser.parse_args()
    if options.tree is not None:
        write_tree(options.tree, 2, options.shown)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    for found in measure(options):
        (options.output / "rare_concepts.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.output / "rare_concepts.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
