"""A set of pictures of many shapes through one job on a flow model: which bucket each goes to, what is cut off, and
whether the stock pipeline, loaded and called by the card's own lines, gives every row's picture back.

    python -m benchmarks.inversion.odd_sizes [--model FOLDER] [--size 128]

The pictures are those inside scikit-image, each cut to three of seven shapes, 1 : 3 to 3 : 1. Writes
results/odd_sizes.json.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import micro
from benchmarks.inversion.pictures import photograph_rows
from benchmarks.inversion.table import RESULTS
from stages.inversion.metrics import measure_pictures

SHAPES = {"square": 1.0, "3:4": 3 / 4, "4:3": 4 / 3, "9:16": 9 / 16, "16:9": 16 / 9, "1:3": 1 / 3, "3:1": 3.0}
"""Width by height."""
EACH = 3
"""Shapes a photograph."""


def write(folder: Path) -> int:
    """The cut photographs, as PNG; their number."""
    names = list(SHAPES)
    rows = photograph_rows(0)
    for i, row in enumerate(rows):
        for j in range(EACH):
            name = names[(i * EACH + j) % len(names)]
            width, height = row["image"].size
            wide = min(width, round(height * SHAPES[name]))
            high = min(height, round(width / SHAPES[name]))
            box = ((width - wide) // 2, (height - high) // 2)
            cut = row["image"].crop((*box, box[0] + wide, box[1] + high))
            cut.save(folder / f"{row['id']}-{name.replace(':', 'x')}.png")
    return EACH * len(rows)


def decibels(made: Any, wanted: Any) -> float:
    x, y = (torch.from_numpy(np.array(one).astype(np.float32) / 127.5 - 1)[None] for one in (made, wanted))
    return float(measure_pictures(x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2))["psnr"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(micro.MODELS / "flux"))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    from datasets import load_dataset
    from PIL import Image

    from jobs.run import run_job

    with tempfile.TemporaryDirectory() as work:
        pictures = Path(work) / "pictures"
        pictures.mkdir()
        count = write(pictures)
        run_job({
            "job": "invert-images", "input": str(pictures), "model": options.model, "steps": options.steps,
            "size": options.size, "fit": "bucket", "prompt": "", "methods": [{"method": "lbo"}], "device": "cpu",
        }, output=f"{work}/out")  # fmt: skip
        rows = load_dataset(f"{work}/out", split="train", cache_dir=f"{work}/cache")
        card = (Path(work) / "out" / "README.md").read_text()
        code = re.search(r"```python\n(import torch.*?)```", card, re.DOTALL)
        assert code is not None
        lines = code[1].splitlines()
        kept = [line for line in lines if not line.startswith(("rows =", "row =", "picture.save"))]
        found = []
        for row in rows:
            names: dict[str, Any] = {"row": row}
            if row["status"] == "ok":
                exec("\n".join(kept), names)
            with Image.open(pictures / row["id"].partition("/")[0]) as source:
                width, height = source.size
            scale = max(row["width"] / width, row["height"] / height)
            found.append({
                "id": row["id"], "status": row["status"], "width": row["width"], "height": row["height"],
                "cut": 1 - row["width"] * row["height"] / (width * height * scale**2),
                "psnr": row["psnr"], "floor_psnr": row["floor_psnr"], "psnr_decoded": row["psnr_decoded"],
                "passes": row["forwards"],
                "stock_psnr": decibels(names["picture"], row["picture"]) if row["status"] == "ok" else None,
            })  # fmt: skip
    good = [one for one in found if one["status"] == "ok"]
    note = {
        "model": Path(options.model).name, "size": options.size, "steps": options.steps, "pictures": count,
        "rows": len(found), "ok": len(good),
        "buckets": {f"{w} x {h}": n for (w, h), n in Counter((r["width"], r["height"]) for r in found).most_common()},
        "cut_mean": float(np.mean([r["cut"] for r in found])), "cut_most": max(r["cut"] for r in found),
        "below_the_floor_mean": float(np.mean([r["floor_psnr"] - r["psnr"] for r in good])),
        "psnr_decoded_least": min(r["psnr_decoded"] for r in good),
        "passes_a_step": float(np.mean([r["passes"] for r in good])) / options.steps,
        "stock_from_stated_most": max(abs(r["stock_psnr"] - r["psnr"]) for r in good),
        "each": found,
    }  # fmt: skip
    (RESULTS / "odd_sizes.json").write_text(json.dumps(note, indent=1) + "\n")
    print(json.dumps({name: value for name, value in note.items() if name != "each"}, indent=1))


if __name__ == "__main__":
    main()
