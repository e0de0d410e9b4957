"""Search in the miniature world: 50 prompts of a colour and a shape, judged by the oracle.

A picture is right if the oracle sees one object in it with both attributes; "color" and "shape" ask for one of the two
alone. "scene" asks the scene that the picture was drawn from instead of the oracle, "chance" judges random pictures.

latentmill run-job benchmarks/index/reference.yaml --output out/bench-reference
python -m benchmarks.index.search
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from index.reference import Reference
from jobs.page.hits import hits
from micro import world
from micro.oracle import Oracle, score
from pipeline.output.dataset import Output
from stages.models.clip import TextEncoder

RESULTS = Path(__file__).with_name("results")
PROMPTS = 50
K = 10
CHANCE = 1000


def prompts() -> list[dict[str, str]]:
    """50 of the pairs of a colour and a shape that the training pictures hold, drawn with a fixed seed."""
    seen = {(shape, color) for shape, color, _ in world.combinations("frequent")}
    pairs = [(s, c) for s, c in product(world.SHAPES, world.COLORS) if (s, c) in seen]
    rows = np.sort(np.random.default_rng(0).choice(len(pairs), PROMPTS, replace=False))
    return [{"shape": pairs[row][0], "color": pairs[row][1]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", nargs="?", default="out/bench-reference", help="of reference.yaml beside this")
    arguments = parser.parse_args()
    reference, output = Reference.open(arguments.reference), Output.open(arguments.reference)
    oracle = Oracle.load()
    encoder = TextEncoder(reference.facts["text_encoder"]["path"])
    asked = prompts()
    texts = [f"{'an' if thing['color'][0] in 'aeiou' else 'a'} {thing['color']} {thing['shape']}" for thing in asked]
    found = reference.neighbours(encoder(texts), K)
    random_C = np.sort(np.random.default_rng(1).choice(reference.rows, CHANCE, replace=False))

    def read(positions: np.ndarray) -> list[tuple[Any, list[Any]]]:
        """What the oracle sees in each picture, and what is really there."""
        rows = hits(output, reference, positions, [0.0] * len(positions))
        readings = oracle.read([row.picture for row in rows])
        truth = [world.Scene.from_json(row.columns["scene"]).things for row in rows]
        return list(zip(readings, truth, strict=True))

    def judged(seen: list[tuple[Any, list[Any]]], thing: dict[str, str]) -> dict[str, float]:
        shares = {"oracle": thing} | {name: {name: value} for name, value in thing.items()}
        result = {name: np.mean([score(reading, [asked]).bound == 1.0 for reading, _ in seen])
                  for name, asked in shares.items()}  # fmt: skip
        result["scene"] = np.mean([any(t.shape == thing["shape"] and t.color == thing["color"] for t in things)
                                   for _, things in seen])  # fmt: skip
        return {name: float(value) for name, value in result.items()}

    random = read(random_C)
    rows = []
    for number, (text, thing) in enumerate(zip(texts, asked, strict=True)):
        chance = {f"chance, {name}": value for name, value in judged(random, thing).items() if name != "scene"}
        rows.append({"prompt": text, **judged(read(found.positions_BK[number]), thing), **chance})
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "prompt"}
    result = {"rows": reference.rows, "k": K, "precision": means, "index": reference.facts["index"], "prompts": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "search.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in ("rows", "k", "precision", "index")}, indent=2))
    for row in sorted(rows, key=lambda row: row["oracle"])[:5]:
        print(row)


if __name__ == "__main__":
    main()
