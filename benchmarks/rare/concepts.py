"""The combinations of the miniature world that the benchmarks beside this draw, with pictures of each.

python -m benchmarks.rare.concepts jobs/examples/rare-concepts   # the folder of concepts that the example job reads
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from micro import prompts, world

SETS = {"rare": "rare", "never": "never", "frequent": "single"}
"""How often the models saw a combination -> the prompt set that names such."""


def concepts(kind: str, count: int, shown: int) -> Iterator[dict[str, Any]]:
    """The first distinct combinations of a prompt set, each with pictures of one such object, drawn anew."""
    seen: set[str] = set()
    for prompt in prompts.load(SETS[kind]):
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


def write_tree(folder: Path, each: int, shown: int) -> None:
    """Rare and never-seen concepts as the folder tree that a job reads."""
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
    parser.add_argument("folder", type=Path)
    parser.add_argument("--concepts", type=int, default=2, help="a kind")
    parser.add_argument("--shown", type=int, default=4, help="pictures of each")
    options = parser.parse_args()
    write_tree(options.folder, options.concepts, options.shown)


if __name__ == "__main__":
    main()
