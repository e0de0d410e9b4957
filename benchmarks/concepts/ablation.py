"""The 2 x 2 ablation of Lego on the miniature world: subject separation x context loss, judged by the oracle.

    python -m benchmarks.concepts.ablation [--train-pictures 4] [--seeds 3] [--pictures 200]

Fifteen concepts (the first twelve by default) with 4 + 4 or 2 + 2 training pictures each: textures, sizes, relations,
pairs of adjectives. Every new word starts from an unrelated one. Generated pictures show *subjects that were not
trained on*. ``presence``: the new subject is there with the concept. ``leak``: an object has the training subject's
shape, or all objects have its colour (no colour is asked for). Context words: those of the concept's kind but for its
opposite (near); its opposite, as in the paper, and shapes and colours (far).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import micro
from micro import world
from micro.oracle import Oracle, Reading
from stages.concepts.prepare import prepare
from stages.concepts.problem import LegoProblem
from stages.concepts.samples import generate
from stages.concepts.settings import LegoSettings, Templates
from stages.engine.randomness import row_seed
from stages.engine.solver import solve
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.settings import LatentModelSettings

RESULTS = Path(__file__).parent / "results"
MODEL = str(micro.MODELS / "stable-diffusion")
START = "here"
TEXTURES, SIZES = ("striped", "dotted", "checkered"), ("small", "large")
RELATIONS = ("left", "right", "above", "below")
OPPOSITES = {"small": "large", "large": "small", "left": "right", "right": "left", "above": "below", "below": "above"}
RELATION_WORDS = {"left of": "<left> of", "right of": "<right> of", "above": "<above>", "below": "<below>"}
OPENINGS = (
    "a {}", "a picture of a {}", "a drawing of a {}", "an image of a {}", "photo of a {}", "there is a {}",
    "here is a {}",
)  # fmt: skip
"""How captions of the world begin: what the miniature model has read, where the official list is new to it."""
CELLS = {
    "textual inversion": {"separation": False, "context": "none"},
    "textual inversion, official script": {
        "separation": False, "context": "none", "templates": "object", "flip": True, "posterior": "sample",
    },
    "textual inversion, the world's texts": {"separation": False, "context": "none", "templates": OPENINGS},
    "context loss only (ReVersion-style)": {"separation": False, "context": "normalised", "skew": 0.5},
    "subject separation only": {"separation": True, "context": "none"},
    "Lego": {"separation": True, "context": "normalised"},
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A concept of the world: what its pictures show, and what the oracle must find.

    Attributes:
        name: Its name.
        concept: Its words as `stages.concepts.concept` takes them.
        asked: Attributes an object must have.
        relation: Or the relation between two objects.
    """

    name: str
    concept: str
    asked: dict[str, str]
    relation: str | None


def targets() -> list[Target]:
    """Fifteen concepts."""
    found = [Target(w, w, {"texture": w}, None) for w in TEXTURES]
    found += [Target(w, w, {"size": w}, None) for w in SIZES]
    found += [Target(r.replace(" ", "-"), text, {}, r) for r, text in RELATION_WORDS.items()]
    found += [
        Target(f"{size}-{texture}", f"{size} {texture}", {"size": size, "texture": texture}, None)
        for size in SIZES
        for texture in TEXTURES
    ]
    return found


def context(word: str) -> tuple[list[str], list[str]]:
    """Words near a word (those of its kind, but for its opposite) and against it (its opposite, shapes, colours)."""
    kind = RELATIONS if word in RELATIONS else TEXTURES + SIZES
    opposite = OPPOSITES.get(word)
    far = [opposite] if opposite else []
    return [w for w in kind if w not in (word, opposite)], [*far, *world.SHAPES, *world.COLORS]


def training_row(target: Target, seed: int, count: int) -> dict[str, Any]:
    """A row of the concept table: pictures of one frequent (shape, colour), with the concept and without it."""
    rng = np.random.default_rng([seed, row_seed(seed, target.name) % 2**32])
    plain = [c for c in world.combinations("frequent") if c[2] == "plain"]
    shape, color, _ = plain[rng.integers(len(plain))]
    other = plain[rng.integers(len(plain))]
    while other[0] == shape:
        other = plain[rng.integers(len(plain))]
    size = target.asked.get("size", "medium")
    texture = target.asked.get("texture", "plain")
    if target.relation:
        shown = [world.compose(rng, [(shape, color, "plain"), other], relation=target.relation) for _ in range(count)]
        prompts = {"prompt_with": f"a {{subject}} {{concept}} a {other[1]} {other[0]}", "prompt_plain": "{concept}"}
    else:
        shown = [world.compose(rng, [(shape, color, texture)], sizes=[size]) for _ in range(count)]
        prompts = {"prompt_with": "a {concept} {subject}", "prompt_plain": "a {concept}"}
    bare = [world.compose(rng, [(shape, color, "plain")], sizes=["medium"]) for _ in range(count)]
    words = [w.strip("<>") for w in target.concept.split() if w != "of"]
    return {
        "id": f"{target.name}-{seed}",
        "name": f"{target.name}-{seed}",
        "concept": target.concept,
        "subject": f"{color} {shape}",
        "with": [Image.fromarray(world.render(s)) for s in shown],
        "without": [Image.fromarray(world.render(s)) for s in bare],
        "start": dict.fromkeys(words, START),
        "positive": {w: context(w)[0] for w in words},
        "negative": {w: context(w)[1] for w in words},
        "prompt_without": "a {subject}",
        **prompts,
        "trained": (shape, color),
        "other": other,
    }


def learn(
    model: LatentModel, rows: list[dict[str, Any]], settings: LegoSettings, seed: int = 0
) -> list[dict[str, Any]]:
    """All rows in one batch."""
    problem = LegoProblem(model, settings, slots=len(rows), max_words=3, seed=seed)
    ready = ({**row, "prepared": prepare(row, model, settings, Templates(), max_words=3, root="")} for row in rows)
    return list(solve(problem, ready))


def evaluate(
    model: LatentModel,
    oracle: Oracle,
    targets_of: dict[str, Target],
    rows: list[dict[str, Any]],
    pictures: int,
    steps: int,
    guidance: float,
    ordinary: bool = False,
) -> list[dict[str, Any]]:
    """Generate each concept on new subjects and judge the pictures; `ordinary` uses the real words instead."""
    judged: list[dict[str, Any]] = []
    each = -(-pictures // len(rows))
    for row in rows:
        target = targets_of[row["name"].rpartition("-")[0]]
        shape, color = row["trained"]
        rng = np.random.default_rng(row_seed(1, row["id"]))
        others = [s for s in world.SHAPES if s not in (shape, row["other"][0])]
        asked = [[str(s) for s in rng.choice(others, 2, replace=False)] for _ in range(each)]
        words = target.concept.replace("<", "").replace(">", "")
        phrase = words if ordinary else row["phrase"]
        template = "a {1} {0} a {2}" if target.relation else "a {0} {1}"
        prompts = [template.format(phrase, *pair) for pair in asked]
        tokens = json.loads(row["tokens"])
        drawn = generate(
            model, prompts, tokens, torch.from_numpy(row["embeddings"][: len(tokens)]),
            seeds=[row_seed(2, row["id"], str(n)) for n in range(each)], steps=steps, guidance=guidance,
            batch_size=64,
        )  # fmt: skip
        for pair, reading in zip(asked, oracle.read(drawn), strict=True):
            seen = judge(reading, target, pair, shape, color)
            judged.append({"concept": target.name, "seed": row["id"].rpartition("-")[2], **seen})
    return judged


def judge(reading: Reading, target: Target, pair: list[str], shape: str, color: str) -> dict[str, bool]:
    """Presence of the concept on the new subject, and leakage of the old one."""
    things = reading.things
    if target.relation:
        firsts, seconds = ([t for t in things if t.shape == name] for name in pair)
        present = any(world.relation_of(a, b) == target.relation for a in firsts for b in seconds)
    else:
        present = any(t.shape == pair[0] and all(getattr(t, k) == v for k, v in target.asked.items()) for t in things)
    leak_shape = any(t.shape == shape for t in things)
    leak_color = bool(things) and all(t.color == color for t in things)
    return {"presence": present, "leak": leak_shape or leak_color, "leak_shape": leak_shape, "leak_color": leak_color}


def interval(values: list[bool], groups: list[str], rounds: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval, resampling whole (concept, seed) groups."""
    rng = np.random.default_rng(0)
    names = sorted(set(groups))
    means = np.array([np.mean([v for v, g in zip(values, groups, strict=True) if g == name]) for name in names])
    drawn = means[rng.integers(len(means), size=(rounds, len(means)))].mean(1)
    return float(means.mean()), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def summary(judged: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [f"{j['concept']}/{j['seed']}" for j in judged]
    table = {
        key: interval([j[key] for j in judged], groups) for key in ("presence", "leak", "leak_shape", "leak_color")
    }
    kinds = {"texture": TEXTURES, "size": SIZES, "relation": tuple(r.replace(" ", "-") for r in RELATION_WORDS)}
    for kind, names in kinds.items():
        some = [j for j in judged if j["concept"] in names]
        if some:
            table[kind] = [float(np.mean([j[key] for j in some])) for key in ("presence", "leak")]
    two = [j for j in judged if j["concept"].count("-") and j["concept"].split("-")[0] in SIZES]
    if two:
        table["two words"] = [float(np.mean([j[key] for j in two])) for key in ("presence", "leak")]
    return {**table, "pictures": len(judged)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder; left out: the shipped miniature")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--context-weight", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concepts", type=int, default=12, help="the first so many of the list")
    parser.add_argument("--train-pictures", type=int, default=4, help="with, and as many without")
    parser.add_argument("--pictures", type=int, default=200, help="generated a cell")
    parser.add_argument("--sampling-steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    parser.add_argument("--name", default="lego_ablation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, oracle = open_latent_model(LatentModelSettings(model=options.model or MODEL, device="cpu")), Oracle.load()
    chosen = targets()[: options.concepts]
    of_name = {t.name: t for t in chosen}
    base = LegoSettings(
        steps=options.steps, window=options.steps // 4, lr=options.lr, context_weight=options.context_weight
    )
    rows = [training_row(t, s, options.train_pictures) for t in chosen for s in range(options.seeds)]
    results: dict[str, Any] = {"settings": vars(options), "cells": {}}
    learned: list[dict[str, Any]] = []
    for cell in options.cells:
        began = time.process_time()
        learned = learn(model, rows, LegoSettings(**base.model_dump() | CELLS[cell]))
        trained = time.process_time()
        judged = evaluate(model, oracle, of_name, learned, options.pictures, options.sampling_steps, options.guidance)
        results["cells"][cell] = summary(judged) | {
            "loss": float(np.mean([row["loss"] for row in learned])),
            "norm": float(np.mean([json.loads(row["norms"])[0] for row in learned])),
            "cpu_seconds_training": trained - began,
            "cpu_seconds_generating": time.process_time() - trained,
        }
        print(cell, json.dumps(results["cells"][cell]), flush=True)
        write(results, options.name)
    judged = evaluate(model, oracle, of_name, learned, options.pictures, options.sampling_steps, options.guidance, True)
    results["cells"]["the real words"] = summary(judged)
    write(results, options.name)


def write(results: dict[str, Any], name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2))
    kinds = [k for k in ("texture", "size", "relation", "two words") if any(k in c for c in results["cells"].values())]
    lines = ["| cell | presence | leakage | of shape | of colour | " + " | ".join(kinds) + " | pictures |"]
    lines.append("|" + "---|" * (6 + len(kinds)))
    for cell, found in results["cells"].items():
        shown = [f"{m:.2f} ({lo:.2f}-{hi:.2f})" for m, lo, hi in (found[k] for k in ("presence", "leak"))]
        shown += [f"{found[k][0]:.2f}" for k in ("leak_shape", "leak_color")]
        shown += [f"{found[k][0]:.2f} / {found[k][1]:.2f}" if k in found else "-" for k in kinds]
        lines.append(f"| {cell} | " + " | ".join(shown) + f" | {found['pictures']} |")
    lines.append(
        "\nPresence and leakage with 95 % bootstrap intervals over (concept, seed); by kind: presence / leakage."
    )
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
