"""The paper's claims on the miniature world: every method in one table, with 95 % confidence intervals.

Fidelity: the cosine of each method's embedding to that of the prompt's true picture, on held-out scenes, on
combinations that training pictures never held, and with a small bank. Pictures: `latentmill compbench`.

    python -m benchmarks.ovi.claims [--prompts 100] [--seeds 3]
    python -m benchmarks.ovi.claims --methods ovi-both     # measures these anew and keeps the others' lines
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.ovi.setting import (
    RESULTS,
    Asked,
    Outcome,
    World,
    asked,
    cosine,
    interval,
    machine,
    open_world,
    reference_of,
    rows_of,
    run,
)
from stages.ovi.settings import OVI, Constraint, Direct, PromptMethod, Retrieval, Stop, TextEmbedding, TrainedPrior


def table_methods(steps: int) -> list[PromptMethod]:
    """The methods of the table; `steps` is the budget of OVI that does not stop by itself."""
    near = Constraint(neighbours=3.0)
    both = Constraint(mahalanobis=0.1, neighbours=1.0)
    moving = Constraint(neighbours=0.5, interval=5)
    return [
        TextEmbedding(),
        TextEmbedding(name="text-rescaled", rescale=True),
        Retrieval(),
        Retrieval(name="retrieval-8", k=8),
        TrainedPrior(),
        OVI(name=f"ovi-{steps}", steps=steps, stop=Stop()),
        OVI(name=f"ovi-{4 * steps}", steps=4 * steps, stop=Stop()),
        OVI(name="ovi-early"),
        OVI(name="ovi-mahalanobis", constraint=Constraint(mahalanobis=0.1)),
        OVI(name="ovi-neighbours", constraint=near),
        OVI(name="ovi-both", constraint=both),
        OVI(name="ovi-compact", compact=True),
        OVI(name="ovi-compact-mahalanobis", compact=True, constraint=Constraint(mahalanobis=0.1)),
        OVI(name="ovi-compact-neighbours", compact=True, constraint=near),
        OVI(name="ovi-compact-neighbours-moving", compact=True, constraint=moving),
        OVI(name="ovi-compact-both", compact=True, constraint=both),
        Direct(name="direct-mahalanobis"),
        Direct(name="direct-neighbours", constraint=near),
        Direct(name="direct-both", constraint=Constraint(mahalanobis=0.1, neighbours=3.0)),
    ]


Line = dict[str, float | None]
"""Measures of a method."""


def fidelity(setting: World, given: Asked, methods: list[PromptMethod], seeds: int) -> dict[str, Line]:
    rows = rows_of(setting, given.prompts)
    text_BE = torch.from_numpy(np.stack([row["text"] for row in rows]))
    reference = setting.context.reference
    assert reference is not None
    table: dict[str, Line] = {}
    for method in methods:
        random = isinstance(method, (OVI, TrainedPrior))  # the others do not depend on the seed
        outcomes: list[Outcome] = [run(method, setting, rows, seed) for seed in range(seeds if random else 1)]
        true_B = np.mean([cosine(outcome.z_BE, given.true_BE) for outcome in outcomes], axis=0)
        z_BE = outcomes[0].z_BE
        mean, half = interval(true_B)
        nearest_BK = reference.index.search(z_BE.numpy(), 1)[0]
        table[method.label] = {
            "true": mean,
            "half": half,
            "text": float(cosine(z_BE, text_BE).mean()),
            "mahalanobis": float((reference.mahalanobis(z_BE.double()) / z_BE.shape[1]).mean()),
            "nearest": float(nearest_BK.mean()),
            "norm": float(z_BE.norm(dim=1).mean()),
            "passes": outcomes[0].mean("passes"),
            "seconds": float(np.mean([outcome.seconds for outcome in outcomes])) / len(rows),
        }
        print(method.label, {k: v and round(v, 4) for k, v in table[method.label].items()}, flush=True)
    return table


def markdown(title: str, table: dict[str, Line]) -> str:
    names = ["text", "mahalanobis", "nearest", "norm", "passes", "seconds"]
    lines = [f"### {title}", "", f"| method | cos to the true picture | {' | '.join(names)} |", "|---" * 8 + "|"]
    for label, row in table.items():
        rest = " | ".join("" if row[name] is None else f"{row[name]:.3g}" for name in names)
        lines.append(f"| {label} | {row['true']:.4f} ± {row['half']:.4f} | {rest} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--small", type=int, default=300, help="rows of the small bank")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--methods", help="only these, with commas")
    parser.add_argument("--sets", default="heldout,never,small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "ovi_claims.json"
    result = json.loads(file.read_text()) if file.exists() else {"tables": {}}
    setting = open_world(options.model, options.rows, options.cache)
    methods = table_methods(options.steps)
    order = [method.label for method in methods]
    if options.methods:
        methods = [method for method in methods if method.label in options.methods.split(",")]
    result |= {"machine": machine(), "prompts": options.prompts, "seeds": options.seeds, "bank": options.rows}
    for name in filter(None, options.sets.split(",")):
        used, kind = setting, name
        if name == "small":
            bank_NE = setting.bank_NE[-options.small :]
            used = replace(setting, bank_NE=bank_NE, context=replace(setting.context, reference=reference_of(bank_NE)))
            kind = "heldout"
        table = fidelity(used, asked(used, kind, options.prompts), methods, options.seeds)
        if options.methods:
            table = {**result["tables"].get(name, {}), **table}
        result["tables"][name] = table = {label: table[label] for label in order if label in table}
        print(markdown(name, table), flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    titles = {
        "heldout": f"Held-out scenes, bank of {options.rows}",
        "never": f"Combinations that no training picture held, bank of {options.rows}",
        "small": f"Held-out scenes, bank of {options.small}",
    }
    text = "\n".join(markdown(titles[name], table) for name, table in result["tables"].items())
    (RESULTS / "ovi_claims.md").write_text(text)


if __name__ == "__main__":
    main()
