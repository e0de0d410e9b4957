"""Rare and never-seen combinations of the miniature world: methods of new seeds x guides, slice by slice.

Nothing is selected (one candidate a picture); the shipped oracle judges. A slice is four pictures of each concept, each
from noise of its own, which all methods start from; one that benchmarks/rare/results/guides.json holds already is not
measured again, so the table grows as time allows. Random seeds' pictures that `benchmarks.rare.pool` has drawn are
judged, not drawn again. Frequent combinations are drawn by plain prompts alone: what the others are measured by. Prints
the table; writes guides.md.

    python -m benchmarks.rare.guides [--methods random nao] [--guides plain aapb] [--kinds never rare] [--pool FOLDER]
    python -m benchmarks.rare.guides --methods nao --guides plain --ilb
    python -m benchmarks.rare.guides --methods random --guides plain --kinds frequent --parts 0
"""

from __future__ import annotations

import argparse
import io
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

import micro
from benchmarks.rare.concepts import concepts
from micro import prompts, world
from micro.oracle import Oracle, score
from stages.inversion.settings import Boost, DdimMethod, LboMethod
from stages.models.clip import ImageEncoder, TextEncoder
from stages.models.fingerprint import describe_model
from stages.rare.seed_select import centroid
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
    SeedSelectMethod,
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
    SeedSelectMethod(steps=6),
    SeedSelectMethod(name="seed-select-nao", start="nao", steps=6),
)
GUIDES: tuple[AnyGuide, ...] = (
    PlainGuide(),
    R2fGuide(until=0.3),
    R2fGuide(name="r2f-all-first", until=0.2, every=1),
    AapbGuide(),
    ComposeGuide(name="compose-half", weight=0.5),
    ComposeGuide(),
)
FEWER = {"seed-select": 1, "seed-select-nao": 2}
"""Pictures of a concept and slice, of the methods that optimise every seed, at most."""
BASELINE = "random:plain"
BOOSTED = "+ilb"
"""Behind a method whose concepts' pictures were inverted from boosted latents."""
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


def rows(options: argparse.Namespace, kind: str, method: str, guide: str, part: int = 0) -> list[dict[str, Any]]:
    """Of a slice's pictures."""
    first, count = part * options.pictures, min(options.pictures, FEWER.get(method, options.pictures))
    return [
        {
            **concept, **({} if kind == "frequent" else frequent_texts(concept["objects"][0])),
            "method": method, "guide": guide, "number": str(number),
            "id": f"{concept['name']}/{method}/{guide}/{number}",
        }
        for concept in concepts(kind, options.concepts, options.shown)
        for number in range(first, first + count)
    ]  # fmt: skip


def passes(method: AnyNoiseMethod, guide: AnyGuide, steps: int) -> int:
    """U-Net passes of a picture, of one row each, without those of the inversion; a backward pass counts as one."""
    drawn = steps * {PlainGuide: 2, R2fGuide: 2, AapbGuide: 3, ComposeGuide: 6}[type(guide)]
    if not isinstance(method, SeedSelectMethod):
        return drawn
    return (
        drawn + method.budget[0] * 2 * (method.steps or steps) * 3
    )  # forward, forward again on the way back, backward


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


def spread(done: list[dict[str, Any]]) -> float | None:
    """How much the pictures of a concept differ: mean deviation of a pixel over its pictures, of 255."""
    by_concept: dict[str, list[np.ndarray]] = {}
    for row in done:
        by_concept.setdefault(row["concept"], []).append(np.asarray(row["image"], dtype=np.float32))
    if min(map(len, by_concept.values())) < 2:
        return None
    return float(np.mean([np.stack(own).std(0, ddof=1).mean() for own in by_concept.values()]))


def measure(
    options: argparse.Namespace, kind: str, method: AnyNoiseMethod, guides: tuple[AnyGuide, ...], part: int
) -> dict[str, dict[str, Any]]:
    """Guide -> the slice of it; the concepts' pictures are inverted once for all of them."""
    stage = RareConcepts(RareConceptsSettings(
        model=options.model, methods=(method,), guides=guides, steps=options.steps, guidance=options.guidance,
        scores=("text", "image", "oracle"), slots=options.slots, device="cpu", seed=0,
        # Random seeds take nothing of it.
        inversion=DdimMethod() if isinstance(method, RandomMethod) else LboMethod(ilb=Boost() if options.ilb else None),
    ))  # fmt: skip
    given = [row for guide in guides for row in rows(options, kind, method.label, guide.label, part)]
    done = list(stage(given))
    bad = [row["error"] for row in done if row["status"] != "ok"]
    if bad:
        raise SystemExit(f"{kind} {method.label}: {len(bad)} rows failed: {bad[0]}")
    shown = {row["name"]: [np.asarray(one, dtype=np.float64) for one in row["pictures"]] for row in given}
    return {guide.label: summary([row for row in done if row["guide"] == guide.label], shown) for guide in guides}


def pooled(options: argparse.Namespace, kind: str, guide: str, part: int) -> dict[str, Any] | None:
    """The slice of random seeds by a guide, of the pictures that a pool holds; None: it holds none of them."""
    file = None if options.pool is None else options.pool / f"{kind}-{guide}-{part:02d}.parquet"
    if file is None or not file.exists():
        return None
    images, asked = ImageEncoder(str(micro.MODELS / "prior"), device="cpu"), {}
    for one in concepts(kind, options.concepts, options.shown):
        asked[one["name"]] = one | {"centre": centroid(images(one["pictures"]))}
    done = [row for row in pq.read_table(file).to_pylist() if row["concept"] in asked]
    prompts_ = sorted({row["prompt"] for row in done})
    texts = dict(zip(prompts_, TextEncoder(str(micro.MODELS / "prior"), None, "cpu")(prompts_), strict=True))
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in done]
    for row, picture, reading in zip(done, pictures, Oracle.load().read(pictures), strict=True):
        own, z_E = asked[row["concept"]], torch.tensor(row["embedding"])
        near = {"clip_score": texts[row["prompt"]], "clip_image": own["centre"]}
        row |= {"image": picture, "success": score(reading, own["objects"]).success}
        row |= {name: 100 * float(torch.cosine_similarity(z_E, to_E, 0).clamp_min(0)) for name, to_E in near.items()}
    shown = {name: [np.asarray(own, np.float64) for own in one["pictures"]] for name, one in asked.items()}
    return summary(done, shown)


def summary(done: list[dict[str, Any]], shown: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Of a slice: right pictures and all, by concept; means of the rest."""
    names = [name for name in ("clip_score", "clip_image", "seed_std", "seed_autocorrelation") if name in done[0]]
    by_concept: dict[str, list[int]] = {}
    for row in done:
        hits = by_concept.setdefault(row["concept"], [0, 0])
        hits[0] += bool(row["success"])
        hits[1] += 1
    return {
        "by_concept": by_concept, **{name: float(np.mean([row[name] for row in done])) for name in names},
        "copies": copies(done, shown), "spread": spread(done),
    }  # fmt: skip


def shares(slices: list[dict[str, Any]]) -> dict[str, float]:
    """Concept -> share of its pictures that are right."""
    hits = {own: np.sum([one["by_concept"][own] for one in slices], axis=0) for own in slices[0]["by_concept"]}
    return {own: float(right / total) for own, (right, total) in hits.items()}


def cells(slices: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """kind:method:guide -> its slices put together: shares by concept, gains over the baseline's same slices, means of
    the rest."""
    of: dict[str, dict[str, dict[str, Any]]] = {}
    for name, one in slices.items():
        cell, _, part = name.rpartition(":")
        of.setdefault(cell, {})[part] = one
    found: dict[str, dict[str, Any]] = {}
    for name, by_part in of.items():
        parts, known = list(by_part.values()), of.get(f"{name.split(':')[0]}:{BASELINE}", {})
        own, plain = shares(parts), [known[part] for part in by_part if part in known]
        told = {key: [one[key] for one in parts if one.get(key) is not None] for part in parts for key in part}
        means = {key: np.mean(values) for key, values in told.items() if key != "by_concept" and values}
        found[name] = {
            "pictures": sum(total for one in parts for _, total in one["by_concept"].values()), "shares": own,
            "gains": [] if len(plain) < len(parts) else [own[each] - share for each, share in shares(plain).items()],
            **{key: float(value) for key, value in means.items()},
        }  # fmt: skip
    return found


def line(name: str, cell: dict[str, Any], steps: int) -> str:
    """One of the table's."""
    kind, method, guide = name.split(":")
    own = list(cell["shares"].values())
    success, (low, high) = float(np.mean(own)), interval(own)
    gain = ""
    if cell["gains"] and f"{method}:{guide}" != BASELINE:
        less, more = interval(cell["gains"])
        gain = f"{np.mean(cell['gains']):+.3f} ({less:+.2f} to {more:+.2f})"
    taken = passes(_named(METHODS, method.removesuffix(BOOSTED)), _named(GUIDES, guide), steps)
    told = [
        kind, method, guide, f"{cell['pictures']}", f"{success:.3f} ({low:.2f} - {high:.2f})", gain,
        f"{cell['clip_score']:.1f}", f"{cell['clip_image']:.1f}", f"{cell['copies']:.3f}",
        f"{cell['spread']:.1f}" if "spread" in cell else "", f"{cell['seed_std']:.3f}" if "seed_std" in cell else "",
        f"{cell['seed_autocorrelation']:.3f}" if "seed_std" in cell else "", f"{taken}",
        f"{taken / success:.0f}" if success else "",
    ]  # fmt: skip
    return f"| {' | '.join(told)} |"


def _named(given: Any, label: str) -> Any:
    return next(one for one in given if one.label == label)


def markdown(found: dict[str, Any]) -> str:
    setting, every = found["setting"], cells(found["slices"])
    head = ["combinations", "seeds", "guide", "pictures", "success by the oracle",
            f"over {BASELINE}, by concept", "CLIP text", "CLIP image", "copies", "spread of pixels", "seed std",
            "seed autocorr.", "passes a picture", "a success"]  # fmt: skip
    described = (
        f"{setting['concepts']} concepts a kind, {setting['shown']} pictures of each (inverted by lbo, but for "
        f"random), {setting['steps']} steps, guidance {setting['guidance']:g}, nothing selected; intervals are 95 %, "
        f"by concept. Shipped weights, U-Net {found['unet'][:12]}, oracle {found['oracle'][:12]}."
    )
    lines = [line(name, cell, setting["steps"]) for name, cell in sorted(every.items())]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]
    return "\n".join(["# Rare concepts: seeds x guides", "", described, "", *table]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(micro.MODELS / "stable-diffusion"))
    parser.add_argument("--kinds", nargs="+", default=["never", "rare"], choices=["rare", "never", "frequent"])
    parser.add_argument("--methods", nargs="+", default=["random"], choices=[one.label for one in METHODS])
    parser.add_argument("--guides", nargs="+", default=["plain", "aapb"], choices=[one.label for one in GUIDES])
    parser.add_argument("--parts", nargs="+", type=int, default=[0, 1, 2], help="slices, by number")
    parser.add_argument("--ilb", action="store_true", help="invert the concepts' pictures from boosted latents")
    parser.add_argument("--pool", type=Path, help="work folder of benchmarks.rare.pool")
    parser.add_argument("--concepts", type=int, default=24, help="a kind")
    parser.add_argument("--pictures", type=int, default=4, help="a concept and slice")
    parser.add_argument("--shown", type=int, default=4, help="pictures of each concept that are inverted")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--limit", type=float, default=float("inf"), help="nothing is begun after so many seconds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("concepts", "pictures", "shown", "steps", "guidance")
    made_by = {
        "setting": {name: getattr(options, name) for name in names},
        "unet": describe_model(options.model, None, "unet")["fingerprint"],
        "oracle": describe_model(str(micro.MODELS / "oracle"))["fingerprint"],
    }
    file = options.output / "guides.json"
    found = json.loads(file.read_text()) if file.exists() else {**made_by, "slices": {}}
    if any(found.get(name) != value for name, value in made_by.items()):
        raise SystemExit(f"{file} was measured otherwise ({found.get('setting')}): delete it, or name another folder")
    begun = time.monotonic()
    for part, label, kind in product(options.parts, options.methods, options.kinds):
        cell = f"{kind}:{label}{BOOSTED * options.ilb}"
        missing = [one for one in options.guides if f"{cell}:{one}:{part}" not in found["slices"]]
        if not missing or time.monotonic() - begun > options.limit:
            continue
        used = time.process_time()
        drawn = {one: pooled(options, kind, one, part) if label == "random" else None for one in missing}
        made = {one: known for one, known in drawn.items() if known is not None}
        guides = tuple(one for one in GUIDES if one.label in missing and one.label not in made)
        if guides:
            made |= measure(options, kind, _named(METHODS, label), guides, part)
        found["slices"] |= {f"{cell}:{guide}:{part}": one for guide, one in made.items()}
        options.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        (options.output / "guides.md").write_text(markdown(found))
        print(kind, label, ",".join(missing), part, f"{time.process_time() - used:.0f} s of CPU", flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
