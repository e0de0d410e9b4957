"""Priors without training against the trained one: bound objects in pictures, milliseconds a prompt, spread of draws.

The stage of `invert-prompts` does the work, in this process; every method is written down as soon as it is measured,
and a second call goes on. The reference is a captioned one of pictures of the miniature world:

    latentmill run-job benchmarks/ovi/captioned.yaml --output out/captioned
    python -m benchmarks.ovi.priors out/captioned --name 20000 [--prompts 40] [--methods linear,kernel] [--draws 16]
    python -m benchmarks.ovi.priors out/captioned --name 20000 --fidelity [--prompts 128]

With `--fidelity` no picture is drawn: what is measured is the cosine to the embedding of the prompt's true picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

import micro
from benchmarks.ovi.setting import RESULTS, Asked, World, cosine, interval, machine, rows_of, run
from benchmarks.ovi.setting import asked as scenes
from index.reference import Reference
from jobs.commands.compbench import Scores, compare, tabulate
from micro import prompts
from pipeline.contract import Row
from stages.models import clip
from stages.models.decoding import Decode
from stages.ovi.context import Context
from stages.ovi.settings import (
    OVI,
    Constraint,
    Direct,
    InvertPromptsSettings,
    Kernel,
    Linear,
    MeanShift,
    Procrustes,
    PromptMethod,
    Retrieval,
    TrainedPrior,
)
from stages.ovi.stage import InvertPrompts


def table_methods() -> dict[str, PromptMethod]:
    """The methods of the table, the most telling first."""
    both = {"mahalanobis": 0.1, "neighbours": 1.0}
    own = {"mahalanobis": 1.0, "units": "balanced", "around": "prompt"}
    captioned = Constraint(**own, neighbours=1.0, nearest_by="caption")
    made = [
        TrainedPrior(),
        Kernel(name="kernel-typical", residual=0.5),
        Kernel(rescale=True),
        Linear(name="linear-typical", residual=0.5),
        Linear(rescale=True),
        Retrieval(name="retrieval-8", k=8),
        OVI(name="ovi-compact-both", compact=True, constraint=Constraint(**both)),
        OVI(name="ovi-compact-captions", compact=True, constraint=captioned),
        Kernel(name="kernel-typical-drawn", residual=0.5, sample=True),
        Linear(name="linear-drawn", sample=True),
        Retrieval(name="captions-1", nearest_by="caption"),
        Retrieval(name="captions-8", nearest_by="caption", k=8),
        Direct(name="direct-captions", constraint=captioned),
        MeanShift(),
        Procrustes(),
    ]
    return {method.label: method for method in made}


def asked(count: int, categories: Sequence[str]) -> list[Row]:
    """The first prompts of each category, as `latentmill compbench --limit` takes them."""
    return [asdict(prompt) for category in categories for prompt in prompts.load(category)[:count]]


def stage_of(method: PromptMethod, reference: str) -> InvertPrompts:
    settings = InvertPromptsSettings(
        encoder=str(micro.MODELS / "prior"), methods=(method,), reference=reference, decoder=Decode(steps=20),
        scores=("clip", "oracle"),
    )  # fmt: skip
    return InvertPrompts(settings, device="cpu")


def milliseconds(stage: InvertPrompts, label: str, rows: list[Row]) -> float:
    """Of a processor, a prompt, without the text encoder, models loaded."""
    texts = stage.text([row["prompt"] for row in rows])
    given = [{**row, "text": t.numpy()} for row, t in zip(rows, texts, strict=True)]
    begun = time.process_time()
    assert len(list(stage.methods[label](iter(given)))) == len(rows)
    return 1000 * (time.process_time() - begun) / len(rows)


def measured(method: PromptMethod, reference: str, rows: list[Row]) -> dict[str, Any]:
    """What the oracle and CLIP say of a picture a prompt, and what a prompt costs."""
    stage, label = stage_of(method, reference), method.label
    out = {row["id"]: row for row in stage({**row, "id": f"{row['id']}/{label}", "method": label} for row in rows)}
    found = [out[f"{row['id']}/{label}"] for row in rows]
    bad = [row["error"] for row in found if row["status"] != "ok"]
    assert not bad, bad[0]
    return {
        **{name: {row["id"]: float(made[name]) for row, made in zip(rows, found, strict=True)}
           for name in ("bound", "success", "clip_score", "norm", "nearest_cosine")},
        "milliseconds": milliseconds(stage, label, rows),
    }  # fmt: skip


def spread(method: PromptMethod, reference: str, rows: list[Row], draws: int) -> dict[str, float]:
    """Of the pictures of one prompt: one minus the mean cosine of two of them in CLIP space; how far a pixel varies, in
    shares of its range."""
    stage, label = stage_of(method, reference), method.label
    encoder: clip.ImageEncoder = stage.image_encoder
    given = [{**row, "id": f"{row['id']}/{draw}/{label}", "method": label} for row in rows for draw in range(draws)]
    out = {row["id"]: row["image"] for row in stage(given)}
    apart, pixels = [], []
    for row in rows:
        pictures = [out[f"{row['id']}/{draw}/{label}"] for draw in range(draws)]
        u_DE = torch.nn.functional.normalize(encoder(pictures).double(), dim=-1)
        apart.append(1 - float((u_DE @ u_DE.mT).sum() - draws) / (draws * (draws - 1)))
        pixels.append(float(np.stack([np.asarray(picture) / 255 for picture in pictures]).std(0).mean()))
    return {"clip": float(np.mean(apart)), "pixels": float(np.mean(pixels)), "prompts": len(rows), "draws": draws}


FIDELITY = ("heldout", "never", "rare")
"""Held-out scenes, and single objects that training pictures show never or five times (`benchmarks.ovi.setting`)."""


def opened(reference: str) -> World:
    """The encoders, and a reference in the bank's place."""
    model = str(micro.MODELS / "prior")
    text, images = clip.TextEncoder(model), clip.ImageEncoder(model)
    context = Context(
        model=model, revision=None, device="cpu", seed=0, vision=lambda: images.model, text=text,
        reference=Reference.open(reference),
    )  # fmt: skip
    return World(context, images, np.empty((0, 0)))


def fidelity(method: PromptMethod, setting: World, given: dict[str, Asked]) -> dict[str, tuple[float, float]]:
    """Mean cosine to the true picture's embedding on each set, and half of its 95 % interval over the prompts."""
    return {
        name: interval(cosine(run(method, setting, rows_of(setting, of.prompts)).z_BE, of.true_BE))
        for name, of in given.items()
    }


def fidelity_table(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = [f"| method | {' | '.join(FIDELITY)} |", "|---" * (len(FIDELITY) + 1) + "|"]
    for label, sets in found.items():
        lines.append(f"| {label} | {' | '.join('{:.3f} ± {:.3f}'.format(*sets[name]) for name in FIDELITY)} |")
    return "\n".join(lines) + "\n"


def markdown(result: dict[str, Any], rows: list[Row]) -> str:
    category = {row["id"]: row["category"] for row in rows}
    scores: dict[tuple[str, str, str], dict[str, float]] = {}
    summary: dict[str, dict[str, float | None]] = {}
    for label, found in result["methods"].items():
        for own, value in found["bound"].items():
            scores.setdefault((label, category[own], "bound"), {})[own] = value
        measures = ("success", "clip_score", "nearest_cosine")
        means = {name: float(np.mean(list(found[name].values()))) for name in measures}
        summary[label] = {**means, "seconds_per_prompt": found["milliseconds"] / 1000}
    told: Scores = scores
    lines = [tabulate(told, summary), compare(told)]
    if result["spread"]:
        lines.append("| method | spread of its draws, CLIP | pixels |\n|---|---|---|\n" + "".join(
            f"| {label} | {found['clip']:.3f} | {found['pixels']:.3f} |\n" for label, found in result["spread"].items()
        ))  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", help="a captioned reference")
    parser.add_argument("--name", required=True, help="of the files in results/")
    parser.add_argument("--prompts", type=int, default=40, help="a category, or a set of `--fidelity`")
    parser.add_argument("--fidelity", action="store_true")
    parser.add_argument("--categories", default=",".join(prompts.COMPBENCH))
    parser.add_argument("--methods", help="only these, with commas")
    parser.add_argument("--draws", type=int, help="pictures of each of twelve prompts, for their spread, instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / f"priors_{options.name}{'_fidelity' * options.fidelity}.json"
    blank: dict[str, Any] = {"prompts": options.prompts, "methods": {}, "spread": {}, "fidelity": {}}
    result = json.loads(file.read_text()) if file.exists() else blank
    rows = asked(options.prompts, options.categories.split(","))
    methods = table_methods()
    setting = opened(options.reference) if options.fidelity else None
    given = {name: scenes(setting, name, options.prompts) for name in FIDELITY} if setting else {}
    for label in options.methods.split(",") if options.methods else methods:
        kind = "fidelity" if setting else "spread" if options.draws else "methods"
        if label in result[kind]:
            continue
        if setting:
            result["fidelity"][label] = fidelity(methods[label], setting, given)
        elif options.draws:
            result["spread"][label] = spread(
                methods[label], options.reference, asked(2, prompts.COMPBENCH), options.draws
            )
        else:
            result["methods"][label] = measured(methods[label], options.reference, rows)
        result["machine"] = machine()
        file.write_text(json.dumps(result) + "\n")
        file.with_suffix(".md").write_text(fidelity_table(result["fidelity"]) if setting else markdown(result, rows))
        print(label, "done", flush=True)


if __name__ == "__main__":
    main()
