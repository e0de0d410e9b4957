"""A pool of pictures of rare and never-seen combinations of the miniature world, drawn once, slice by slice.

Every picture is kept with its CLIP embedding, so that what the best of N is worth is told without drawing again:
groups of N by number, the best by its cosine to the prompt, or by that less its cosine to the likeliest foil (the
prompt with one word replaced by any other of its kind); the shipped oracle judges. A slice is four pictures of each
concept by one guide. Prints the table of all slices in the folder; writes results/pool.md and .json.

    python -m benchmarks.rare.pool --work FOLDER [--guides plain aapb] [--slices 3] [--limit 500]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import micro
from benchmarks.rare.concepts import concepts
from benchmarks.rare.guides import GUIDES, interval, rows
from micro import world
from micro.oracle import Oracle, score
from stages.models.clip import ImageEncoder, TextEncoder
from stages.rare.settings import RandomMethod, RareConceptsSettings
from stages.rare.stage import RareConcepts

EACH = 4
"""Pictures of a concept in a slice."""
KINDS = ("never", "rare")


def draw(options: argparse.Namespace, kind: str, label: str, part: int, images: ImageEncoder) -> pa.Table:
    """One slice."""
    guide = next(one for one in GUIDES if one.label == label)
    stage = RareConcepts(RareConceptsSettings(
        model=str(micro.MODELS / "stable-diffusion"), methods=(RandomMethod(),), guides=(guide,), steps=options.steps,
        guidance=options.guidance, scores=("oracle",), slots=16, device="cpu", seed=options.seed,
    ))  # fmt: skip
    asked = argparse.Namespace(concepts=options.concepts, shown=0, pictures=EACH)
    done = list(stage(rows(asked, kind, "random", label, part)))
    bad = [row["error"] for row in done if row["status"] != "ok"]
    if bad:
        raise SystemExit(f"{kind} {label}: {len(bad)} rows failed: {bad[0]}")
    z_BE = images([row["image"] for row in done]).numpy()
    return pa.Table.from_pylist([
        {"kind": kind, "guide": label, "concept": row["concept"], "prompt": row["prompt"], "number": row["number"],
         "success": bool(row["success"]), "embedding": z_E.tolist(), "image": _png(row["image"])}
        for row, z_E in zip(done, z_BE, strict=True)
    ])  # fmt: skip


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read(work: Path) -> list[dict[str, Any]]:
    """The pictures of all slices that are there, in a fixed order, each with what the shipped oracle says of it."""
    made = [row for file in sorted(work.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    asked = {own["name"]: own["objects"] for kind in KINDS for own in concepts(kind, 48, 0)}
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in made]
    for row, reading in zip(made, Oracle.load().read(pictures), strict=True):
        row["success"] = score(reading, asked[row["concept"]]).success
    return sorted(made, key=lambda row: (row["kind"], row["concept"], int(row["number"]), row["guide"]))


def foils(prompt: str) -> list[str]:
    """The prompt with one word replaced by each other shape, colour or texture."""
    words, found = prompt.split(), []
    for n, word in enumerate(words):
        for kinds in (world.SHAPES, tuple(world.COLORS), world.TEXTURES[1:]):
            if word in kinds:
                found += [" ".join([*words[:n], other, *words[n + 1 :]]) for other in kinds if other != word]
    return found


def scored(made: list[dict[str, Any]]) -> None:
    """Add to each `text`, its cosine to the prompt, and `contrast`, that less the cosine to its likeliest foil."""
    texts = TextEncoder(str(micro.MODELS / "prior"), None, "cpu")
    known = {}
    for prompt in dict.fromkeys(row["prompt"] for row in made):
        t_FE = texts([prompt, *foils(prompt)]).double().numpy()
        known[prompt] = t_FE / np.linalg.norm(t_FE, axis=1, keepdims=True)
    for row in made:
        z_E = np.array(row["embedding"], np.float64)
        cos_F = known[row["prompt"]] @ z_E / np.linalg.norm(z_E)
        row |= {"text": float(cos_F[0]), "contrast": float(cos_F[0] - cos_F[1:].max())}


def best_of(own: list[dict[str, Any]], count: int, by: str) -> list[bool]:
    """Whether the best of each whole group of `count` pictures is right."""
    groups = [own[n : n + count] for n in range(0, len(own) - count + 1, count)]
    return [max(group, key=lambda row: row[by])["success"] for group in groups]


def table(made: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Success of the best of N, by kind, guide and score."""
    cells: dict[str, Any] = {}
    pools = (("plain",), ("aapb",), ("compose-half",), ("plain", "aapb"), ("plain", "compose-half"))
    guides = {" and ".join(taken): taken for taken in (*pools, ("plain", "aapb", "compose-half"))}
    for kind in KINDS:
        for label, taken in guides.items():
            for count, by in [(1, "text"), *((n, by) for n in (4, 8) for by in ("text", "contrast"))]:
                shares, rows_of = [], [row for row in made if row["kind"] == kind and row["guide"] in taken]
                common = min(max((int(r["number"]) for r in rows_of if r["guide"] == g), default=-1) for g in taken)
                kept = 0
                for name in sorted({row["concept"] for row in rows_of}):
                    own = [r for r in rows_of if r["concept"] == name and int(r["number"]) <= common]
                    right = best_of(own, count, by)
                    kept += len(right)
                    shares += [float(np.mean(right))] if right else []
                if shares:
                    cells[f"{kind}:{label}:{count}:{by}"] = {
                        "kept": kept, "success": float(np.mean(shares)), "interval": interval(shares)
                    }  # fmt: skip
    lines = ["# The best of N", "", "| combinations | guide | the best of | by | pictures kept | success |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, cell in cells.items():
        kind, label, count, by = name.split(":")
        low, high = cell["interval"]
        lines.append(
            f"| {kind} | {label} | {count} | {by} | {cell['kept']} | {cell['success']:.3f} ({low:.2f} - {high:.2f}) |"
        )
    return "\n".join(lines) + "\n", cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--guides", nargs="+", default=["plain", "aapb", "compose-half"])
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--concepts", type=int, default=24, help="a kind")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=float("inf"), help="no slice is begun after so many seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    begun, images = time.monotonic(), ImageEncoder(str(micro.MODELS / "prior"), device="cpu")
    for part in range(options.slices):
        for guide in options.guides:
            for kind in KINDS:
                file = options.work / f"{kind}-{guide}-{part:02d}.parquet"
                if file.exists() or time.monotonic() - begun > options.limit:
                    continue
                used = time.process_time()
                drawn = draw(options, kind, guide, part, images)
                draft = file.with_suffix(".tmp")
                pq.write_table(drawn, draft)
                draft.replace(file)
                share = np.mean(drawn["success"].to_pylist())
                print(f"{file.stem}: {len(drawn)}, right {share:.3f}, {time.process_time() - used:.0f} s", flush=True)

    made = read(options.work)
    scored(made)
    text, cells = table(made)
    (options.output / "pool.md").write_text(text)
    (options.output / "pool.json").write_text(json.dumps(cells, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
