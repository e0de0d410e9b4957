"""What corpora of rare and never-seen combinations of the miniature world are worth to a classifier, cell by cell.

Real pictures are drawn by the world's own renderer: of each rare combination as many as the models have seen, of each
never-seen one none, and of frequent ones that share a shape, or colour and texture, with these. A corpus has the same
number of pictures of each rare and never-seen combination: drawn by a guide from the same random seeds, or the best of
several by the CLIP score to the prompt, as a user would keep them; those of them that the oracle finds right; or, as
the control, by the renderer. Pictures are drawn once into the work folder; a cell
that results/judge.json holds already is not trained again. Prints the table; writes judge.md.

    python -m benchmarks.rare.judge [--guides plain aapb aapb-best8] [--limit 500] [--work /tmp/judge]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import micro
from benchmarks.rare.concepts import concepts
from benchmarks.rare.guides import GUIDES, STAND_IN, USUAL, rows
from micro import world
from pipeline.input.source import Source
from stages.judging.measures import GROUPS, group_of, judgement
from stages.judging.settings import REAL, JudgeCorpusSettings
from stages.judging.stage import JudgeCorpus
from stages.models.fingerprint import describe_model
from stages.rare.settings import RandomMethod, RareConceptsSettings
from stages.rare.stage import RareConcepts

RESULTS = Path(__file__).parent / "results"
KINDS = ("rare", "never")
SEEDS = {"real": 41, "held-out": 43, "renderer": 47}
"""Of the renderer's scenes, one for each set."""
PERFECT, RIGHT, BEST = "renderer", "-right", "-best"
BASELINE = "plain"


def wanted(options: argparse.Namespace) -> dict[str, world.Combination]:
    """Name -> the rare and never-seen combinations that corpora are of."""
    found = {}
    for kind in KINDS:
        for concept in concepts(kind, options.concepts, 0):
            asked = concept["objects"][0]
            one = asked["shape"], asked["color"], asked["texture"]
            found[named(one)] = one
    return found


def near(combination: world.Combination) -> Iterator[world.Combination]:
    """Frequent combinations that a classifier can take it for: its colour and texture on another shape, its shape in a
    usual colour."""
    shape, colour, texture = combination
    usual = USUAL.get(shape, colour)
    yield STAND_IN[shape], colour, texture
    yield shape, usual, texture if world.rarity(shape, usual, texture) == "frequent" else "plain"


def named(combination: world.Combination) -> str:
    shape, colour, texture = combination
    return f"{texture} {colour} {shape}"


def write(path: Path, pictures: Iterable[tuple[str, bytes]]) -> None:
    """Labels and encoded pictures as a Parquet file."""
    made = [
        {"id": f"{path.stem}-{n}", "label": label, "image": {"bytes": data, "path": None}}
        for n, (label, data) in enumerate(pictures)
    ]
    draft = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(made), draft)
    draft.replace(path)


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def rendered(name: str, counts: Mapping[world.Combination, int]) -> Iterator[tuple[str, bytes]]:
    """So many pictures of each combination by the world's own renderer."""
    for number, (combination, count) in enumerate(sorted(counts.items())):
        for picture in range(count):
            scene = world.compose(np.random.default_rng([SEEDS[name], number, picture]), [combination])
            yield named(combination), encoded(Image.fromarray(world.render(scene)))


def draw(options: argparse.Namespace, label: str) -> None:
    """A guide's corpus, and beside it those of its pictures that the oracle finds right. `aapb-best8`: each the best of
    eight of that guide's."""
    drawn_by, _, candidates = label.partition(BEST)
    guide = next(one for one in GUIDES if one.label == drawn_by)
    stage = RareConcepts(RareConceptsSettings(
        model=str(micro.MODELS / "stable-diffusion"), methods=(RandomMethod(),), guides=(guide,), steps=options.steps,
        guidance=options.guidance, scores=("text", "oracle"), candidates=int(candidates or 1), slots=16,
        device="cpu", seed=options.seed,
    ))  # fmt: skip
    made, begun = [], time.process_time()
    for kind in KINDS:
        made += list(stage(rows(options, kind, "random", drawn_by)))
    bad = [row["error"] for row in made if row["status"] != "ok"]
    if bad:
        raise SystemExit(f"{label}: {len(bad)} rows failed: {bad[0]}")
    named_rows = [(row["concept"].replace("-", " "), encoded(row["image"]), bool(row["success"])) for row in made]
    if any(right for _, _, right in named_rows):
        write(options.work / f"{label}{RIGHT}.parquet", ((own, data) for own, data, right in named_rows if right))
    write(options.work / f"{label}.parquet", ((own, data) for own, data, _ in named_rows))
    print(f"{label}: {len(made)} pictures, {time.process_time() - begun:.0f} s of CPU", flush=True)


def prepare(options: argparse.Namespace, limit: float) -> list[str]:
    """Draw what is missing until the time is over; the names of the corpora that are there."""
    rare = wanted(options)
    frequent = sorted({own for one in rare.values() for own in near(one)})
    seen = {**dict.fromkeys(frequent, options.frequent)}
    seen |= {one: world.RARE_SEEN for one in rare.values() if world.rarity(*one) == "rare"}
    sets = {
        "real": seen,
        "held-out": dict.fromkeys([*frequent, *rare.values()], options.asked),
        PERFECT: dict.fromkeys(rare.values(), options.pictures),
    }
    options.work.mkdir(parents=True, exist_ok=True)
    for name, counts in sets.items():
        if not (options.work / f"{name}.parquet").exists():
            write(options.work / f"{name}.parquet", rendered(name, counts))
    for label in options.guides:
        if not (options.work / f"{label}.parquet").exists() and time.monotonic() < limit:
            draw(options, label)
    names = [*options.guides, PERFECT, *(f"{label}{RIGHT}" for label in options.guides)]
    return [name for name in names if (options.work / f"{name}.parquet").exists()]


def train(options: argparse.Namespace, names: Sequence[str], limit: float, found: dict[str, Any], file: Path) -> None:
    """The trainings that are missing, until the time is over."""
    missing = [
        (trial, name)
        for trial in map(str, range(options.trials))
        for name in (REAL, *names)
        if trial not in found["shares"].get(name, {})
    ]
    if not missing:
        return
    given = {name: Source((str(options.work / f"{name}.parquet"),), id="id").to_json() for name in names}
    held, real = (Source((str(options.work / f"{name}.parquet"),), id="id").to_json() for name in ("held-out", "real"))
    stage = JudgeCorpus(JudgeCorpusSettings(
        held_out=held, real=real, corpora=given, epochs=options.epochs, batch_size=32, rare=world.RARE_SEEN,
        device="cpu", added=2 * options.concepts * options.pictures, seed=options.seed, labels=("label",),
    ))  # fmt: skip
    for trial, name in missing:
        if time.monotonic() > limit:
            return
        begun = time.process_time()
        (row,) = stage([{"id": f"{name}/{trial}", "corpus": name, "trial": trial}])
        if row["status"] != "ok":
            raise SystemExit(f"{name}: {row['error']}")
        classes = json.loads(row["by_class"])
        found["shares"].setdefault(name, {})[trial] = {own: hit / shown for own, (hit, shown) in classes.items()}
        found["usable"][name] = row["usable"]
        counts = json.loads(row["real_counts"])
        found["groups"] = {own: group_of(count, world.RARE_SEEN) for own, count in counts.items()}
        file.write_text(json.dumps(found, indent=1) + "\n")
        means = {group: None if row[group] is None else round(row[group], 3) for group in GROUPS}
        print(trial, name, means, f"{time.process_time() - begun:.0f} s of CPU", flush=True)


def precision(options: argparse.Namespace, name: str) -> float | None:
    """The share of a guide's pictures that the oracle finds right."""
    right = options.work / f"{name}{RIGHT}.parquet"
    whole = options.work / f"{name}.parquet"
    return pq.read_metadata(right).num_rows / pq.read_metadata(whole).num_rows if right.exists() else None


def markdown(found: Mapping[str, Any]) -> str:
    setting = found["setting"]
    told = judgement(found["shares"], found["groups"], BASELINE)
    classes = {group: sum(of == group for of in found["groups"].values()) for group in GROUPS}
    head = ["corpus", "pictures", "right by the oracle", "trainings"]
    head += [f"{group} ({classes[group]})" for group in GROUPS]
    head += [f"{group}: over {BASELINE}, points" for group in GROUPS]
    lines = [
        "# What corpora are worth to a classifier", "",
        f"{setting['pictures']} pictures of each of {2 * setting['concepts']} combinations a corpus "
        f"({setting['steps']} steps, guidance {setting['guidance']:g}); real pictures: {setting['frequent']} of each "
        f"frequent combination, {world.RARE_SEEN} of each rare one; {setting['asked']} held-out ones of each. "
        f"Trainings of {setting['epochs']} epochs, one head. Shipped weights, U-Net {found['unet'][:12]}, oracle "
        f"{found['oracle'][:12]}.", "",
        f"| {' | '.join(head)} |", "|---" * len(head) + "|",
    ]  # fmt: skip
    for name, groups in told.items():
        right = found["precision"].get(name)
        means = [f"{groups[g]['mean']:.3f} ({groups[g]['low']:.2f} - {groups[g]['high']:.2f})" for g in GROUPS]
        gains = [groups[g].get("difference") for g in GROUPS]
        gained = [
            "" if d is None else f"{100 * d['mean']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
            for d in gains
        ]
        lines.append(
            f"| {name} | {found['usable'][name]} | {'' if right is None else f'{right:.2f}'} | "
            f"{len(found['shares'][name])} | {' | '.join(means)} | {' | '.join(gained)} |"
        )
    return "\n".join(lines) + "\n"


def points(gain: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * gain[name]:+.1f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", nargs="*", default=["plain", "aapb"])
    parser.add_argument("--concepts", type=int, default=4, help="a kind")
    parser.add_argument("--pictures", type=int, default=8, help="of each combination in a corpus")
    parser.add_argument("--frequent", type=int, default=15, help="real pictures of each frequent combination")
    parser.add_argument("--asked", type=int, default=15, help="held-out pictures of each combination")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=float("inf"), help="nothing is begun after so many seconds")
    parser.add_argument("--work", type=Path, default=Path("/tmp/judge"), help="folder of what is drawn")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.shown = 0
    torch.set_num_threads(1)
    names = ("concepts", "pictures", "frequent", "asked", "steps", "guidance", "epochs", "trials", "seed")
    setting = {name: getattr(options, name) for name in names}
    file = options.output / "judge.json"
    unet = describe_model(str(micro.MODELS / "stable-diffusion"), None, "unet")["fingerprint"]
    oracle = describe_model(str(micro.MODELS / "oracle"))["fingerprint"]
    found: dict[str, Any] = {"setting": setting, "unet": unet, "oracle": oracle}
    found |= {name: {} for name in ("shares", "usable", "groups", "precision")}
    if file.exists():
        found = json.loads(file.read_text())
        if (found["setting"], found["unet"], found.get("oracle")) != (setting, unet, oracle):
            raise SystemExit(f"{file} was measured otherwise ({found['setting']}): name another with --output")
    limit = time.monotonic() + options.limit
    corpora = prepare(options, limit)
    found["precision"] = {name: own for name in options.guides if (own := precision(options, name)) is not None}
    train(options, corpora, limit, found, file)
    if BASELINE in found["shares"]:
        file.write_text(json.dumps(found, indent=1) + "\n")
        (options.output / "judge.md").write_text(markdown(found))
        print(markdown(found))


if __name__ == "__main__":
    main()
