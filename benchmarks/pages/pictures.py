"""The pictures on the pages of the jobs, from chains of small jobs on the miniature models.

``python -m benchmarks.pages.pictures [pages chain words texts corpora]`` writes docs/figures/job-*.webp. What came out
is drawn, nothing is picked. ``corpora`` draws what ``benchmarks.rare.judge`` found; the others run their jobs.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

import micro
from benchmarks.pages import captioner
from jobs.run import run_job

FIGURES = Path("docs/figures")
PROMPTS = ("a red star", "two blue circles", "a green cross above a yellow square", "a dotted pink heart")
SIDE, LINE, MARGIN = 96, 20, 6
JUDGED = Path("benchmarks/rare/results/judge.json")
CORPORA = {"real": "real pictures alone", "plain": "drawn", "aapb": "drawn by a guide",
           "plain-right": "drawn, those that are right", "renderer": "rendered (control)"}  # fmt: skip

STEPS: list[dict[str, Any]] = [
    {"name": "reference", "job": "reference", "input": "micro-world://train?rows=600&seed=0", "encoder": "micro:prior",
     "keep": ["caption", "image"], "shard_rows": 600},
    {"name": "prompts", "job": "invert-prompts", "encoder": "micro:prior",
     "reference": "${reference}", "decode": {"model": "micro:decoder", "steps": 20},
     "methods": ["text-embedding", {"method": "ovi", "constraint": {"neighbours": 3.0}}, "trained-prior"]},
    {"name": "few", "job": "reference", "input": "micro-world://train?rows=5&seed=3", "encoder": "micro:prior",
     "keep": ["caption", "image"]},
    {"name": "decode", "job": "decode", "encoder": "micro:prior",
     "input": {"path": "${few}", "columns": {"embedding": "embedding", "original": "image"}},
     "decode": {"model": "micro:decoder", "steps": 20}, "draws": 3, "keep": ["original"]},
    {"name": "images", "job": "invert-images", "model": "micro:flux", "size": 128, "steps": 20,
     "input": {"path": "jobs/examples/quickstart/photographs.jsonl", "images": ["image"]}, "methods": ["euler", "lbo"]},
    {"name": "words", "job": "learn-concepts", "input": "jobs/examples/quickstart/concepts",
     "model": "micro:stable-diffusion",
     "learning": {"steps": 100, "window": 25, "lr": 0.02, "context": "none"},
     "samples": {"subjects": ["blue star", "green square", "yellow heart", "black cross"],
                 "prompt": "a {concept} {subject}", "draws": 2, "steps": 20, "guidance": 4}},
    {"name": "rare", "job": "rare-concepts", "input": "jobs/examples/rare-concepts", "model": "micro:stable-diffusion",
     "encoder": "micro:prior", "methods": ["random", "nao"], "count": 5, "steps": 25, "guidance": 4},
    {"name": "corpus", "job": "select-corpus", "input": "${rare}", "encoder": "micro:prior", "count": 4, "near": 0.97},
]  # fmt: skip

CHAIN: list[dict[str, Any]] = [
    {"name": "pictures", "job": "reference", "input": "micro-world://train?rows=600&seed=0", "encoder": "micro:prior",
     "keep": ["caption", "image"], "captions": True, "shard_rows": 600},
    {"name": "prompts", "job": "invert-prompts", "encoder": "micro:prior", "reference": "${pictures}",
     "methods": ["linear"]},
    {"name": "drawn", "job": "decode", "encoder": "micro:prior", "decode": {"model": "micro:decoder", "steps": 20},
     "draws": 4, "keep": ["prompt"]},
]  # fmt: skip
"""Pictures that have captions, prompts against them, and what a decoder draws."""


WORDS: list[dict[str, Any]] = [
    {"name": "captions", "job": "caption", "input": "micro-world://heldout?rows=16&seed=0", "max_tokens": 40,
     "keep": ["image"]},
]  # fmt: skip
"""Captions by a small BLIP that `captioner` trains."""

TEXTS: list[dict[str, Any]] = [
    {"name": "inverter", "job": "train-inverter", "guidance": 3, "steps": 12,
     "input": {"path": "micro-world://train?rows=1000&seed=7", "columns": {"prompt": "caption"}},
     "model": "micro:stable-diffusion", "network": {"width": 128, "layers": 4, "heads": 4},
     "training": {"steps": 1000, "batch_size": 32, "lr": 1e-3, "noise_rows": 2}},
    {"name": "texts", "job": "invert-text", "model": "micro:stable-diffusion", "inverter": "${inverter}",
     "input": "micro-world://heldout?rows=6&seed=0", "keep": ["image"]},
]  # fmt: skip
"""A network that reads text latents off pictures, and its use on six that it has not seen."""


Row = dict[str, Any]
Line = tuple[str, Sequence[Image.Image | None]]
"""What stands at the left of a line of pictures, and the pictures."""


def rows(folder: Path) -> list[Row]:
    """The rows of a finished dataset that are ok."""
    found = [row for file in sorted(folder.glob("data/*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [row for row in found if row["status"] == "ok"]


def opened(encoded: Row | None) -> Image.Image | None:
    return None if encoded is None else Image.open(io.BytesIO(encoded["bytes"])).convert("RGB")


def sheet(lines: Iterable[Line], heads: Sequence[str], name: str) -> None:
    """Write lines of pictures, each with its text at the left, under column heads."""
    lines = list(lines)
    font = ImageFont.load_default(12)
    left = max(round(font.getlength(text)) for text, _ in lines) + 2 * MARGIN
    width = left + max(len(pictures) for _, pictures in lines) * (SIDE + MARGIN) + MARGIN
    top = LINE + MARGIN if heads else MARGIN
    canvas = Image.new("RGB", (width, top + len(lines) * (SIDE + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        draw.text((left + column * (SIDE + MARGIN), MARGIN), head, "black", font)
    for line, (text, pictures) in enumerate(lines):
        y = top + line * (SIDE + MARGIN)
        draw.text((MARGIN, y + SIDE // 2 - 8), text, "black", font)
        for column, picture in enumerate(pictures):
            if picture is not None:
                canvas.paste(
                    picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left + column * (SIDE + MARGIN), y)
                )
    canvas.save(FIGURES / f"{name}.webp", quality=85, method=6)


def by(found: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in the order in which these come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def draw_reference(chain: Path) -> None:
    """The pictures that a reference finds for three prompts."""
    from index.reference import Reference
    from stages.models.clip import TextEncoder, identity

    folder, queries = chain / "reference", ("a red star", "blue circles", "a checkered square")
    encoder = str(micro.MODELS / "prior")
    reference = Reference.open(str(folder), encoder=identity(encoder, "image"))
    found = reference.neighbours(TextEncoder(encoder)(list(queries)), k=6)
    pictures = {row["id"]: opened(row["image"]) for row in rows(folder)}
    lines = [(query, [pictures[key] for key in keys]) for query, keys in zip(queries, found.ids, strict=True)]
    sheet(lines, [], "job-reference")


def draw_prompts(chain: Path) -> None:
    """What the decoder draws of each method's embedding."""
    groups = by(rows(chain / "prompts"), "prompt")
    methods = [row["method"] for row in next(iter(groups.values()))]
    sheet(
        [(key[0], [opened(row["image"]) for row in group]) for key, group in groups.items()],
        methods,
        "job-invert-prompts",
    )


def draw_decode(chain: Path) -> None:
    """Pictures, and what three draws from their embeddings show."""
    groups = by([{**row, "of": row["id"].rpartition("/")[0]} for row in rows(chain / "decode")], "of")
    columns = [[opened(group[0]["original"]), *(opened(row["image"]) for row in group)] for group in groups.values()]
    names = ("picture", "draw 0", "draw 1", "draw 2")
    sheet([(name, [column[line] for column in columns]) for line, name in enumerate(names)], [], "job-decode")


def draw_images(chain: Path) -> None:
    """Photographs, and what their seeds draw."""
    groups = by(rows(chain / "images"), "method")
    first = next(iter(groups.values()))
    lines: list[Line] = [("photograph", [opened(row["picture"]) for row in first])]
    for (method,), group in groups.items():
        mean = sum(row["psnr"] for row in group) / len(group)
        lines.append((f"{method}, {mean:.1f} dB", [opened(row["reconstruction"]) for row in group]))
    sheet(lines, [], "job-invert-images")


def draw_words(chain: Path) -> None:
    """What a word was learned from, and new subjects with it: two draws of each, as the job's own sheet has them."""
    (row,) = rows(chain / "words")
    training, samples = opened(row["training"]), opened(row["samples"])
    assert training is not None
    assert samples is not None
    side, step = training.height, training.height + 4
    shown = [training.crop((x, 0, x + side, side)) for x in range(0, training.width, step)]
    corners = [(x, y) for y in range(0, samples.height, step) for x in range(0, samples.width, step)]
    drawn = [samples.crop((x, y, x + side, y + side)) for x, y in corners]
    sheet([("learned from", shown), ("with the word", drawn)], [], "job-learn-concepts")


def draw_rare(chain: Path) -> None:
    """New pictures of two concepts by method, and which of them the corpus keeps."""
    new = rows(chain / "rare")
    shown = list(by(new, "concept"))[:2]
    groups = by([row for row in new if (row["concept"],) in shown], "concept", "method")
    lines = [
        (f"{group[0]['prompt']}, {key[1]}", [opened(row["image"]) for row in group]) for key, group in groups.items()
    ]
    sheet(lines, [], "job-rare-concepts")
    chosen = pq.read_table(chain / "corpus" / "selection.parquet").to_pylist()
    kept = {row["id"]: row["kept"] for row in chosen}
    pool = by([row for row in new if (row["concept"],) in shown], "concept")
    lines = []
    for (concept,), group in pool.items():
        for wanted, text in ((True, "kept"), (False, "left out")):
            lines.append((f"{concept}: {text}", [opened(row["image"]) for row in group if kept[row["id"]] == wanted]))
    sheet(lines, [], "job-select-corpus")


def draw_chain(chain: Path) -> None:
    """What the first step read, and what the last one drew."""
    seen = [opened(row["image"]) for row in rows(chain / "pictures")[:4]]
    groups = by(rows(chain / "drawn"), "prompt")
    lines = [(key[0], [opened(row["image"]) for row in group]) for key, group in groups.items()]
    sheet([("four of 600 pictures", seen), *lines], [], "job-chain")


def draw_captions(chain: Path) -> None:
    """The first pictures of one thing, which is what it was trained on, and what the captioner says of them."""
    from micro import world

    font = ImageFont.load_default(14)
    told = [(int(row["id"].rpartition("#")[2]), row) for row in rows(chain / "captions")]
    found = [row for index, row in told if len(world.sample_scene(index, "heldout").things) == 1][:6]
    width = max(round(font.getlength(row["caption"])) for row in found) + SIDE + 3 * MARGIN
    canvas = Image.new("RGB", (width, len(found) * (SIDE + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for line, row in enumerate(found):
        y = line * (SIDE + MARGIN) + MARGIN
        picture = opened(row["image"])
        assert picture is not None
        canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (MARGIN, y))
        draw.text((SIDE + 2 * MARGIN, y + SIDE // 2 - 9), row["caption"], "black", font)
    canvas.save(FIGURES / "job-caption.webp", quality=85, method=6)


def draw_texts(chain: Path) -> None:
    """Pictures, and two that the model draws of the text latent read off each, from noise of their own."""
    import numpy as np
    import torch

    from stages.engine.randomness import row_generator
    from stages.inverter.training import text_conditions
    from stages.models.families import open_latent_model
    from stages.models.pictures import to_picture
    from stages.models.settings import LatentModelSettings

    found = rows(chain / "texts")
    model = open_latent_model(LatentModelSettings(model=str(micro.MODELS / "stable-diffusion"), device="cpu"))
    empty_1TK = text_conditions(model, [""])[0]
    read = np.stack([np.asarray(row["text_latent"], np.float32) for row in found])
    text_BTK = torch.from_numpy(read).reshape(len(found), *empty_1TK.shape[1:])
    condition = {"text_BLE": text_BTK, "null_text_BLE": empty_1TK.expand_as(text_BTK)}
    lines: list[Line] = [("picture", [opened(row["image"]) for row in found])]
    for number in range(2):
        generators = [row_generator(0, row["id"], f"drawn {number}") for row in found]
        with torch.no_grad():
            z_BCHW = model.draw(condition, steps=25, guidance=3.0, generators=generators)
            drawn = [to_picture(x_CHW) for x_CHW in model.decode(z_BCHW)]
        lines.append((f"drawn {number}", drawn))
    sheet(lines, [], "job-train-inverter")


def draw_corpora() -> None:
    """What a classifier tells right with each corpus, as `benchmarks.rare.judge` left it."""
    from matplotlib import pyplot

    from stages.judging.measures import GROUPS, judgement

    found = json.loads(JUDGED.read_text())
    told = judgement(found["shares"], found["groups"], "plain")
    figure, axes = pyplot.subplots(figsize=(6.4, 2.4), dpi=110, layout="constrained")
    for number, (name, groups) in enumerate(told.items()):
        places = [group + 0.16 * (number - 2) for group in range(len(GROUPS))]
        means = [groups[group]["mean"] for group in GROUPS]
        ends = [[abs(groups[g]["mean"] - groups[g][end]) for g in GROUPS] for end in ("low", "high")]
        axes.bar(places, means, 0.15, yerr=ends, label=CORPORA[name], error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(GROUPS)), ["classes never seen", "rare classes", "frequent classes"])
    axes.set_ylabel("share told right")
    axes.legend(fontsize=7, loc="upper left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    Image.open(picture).convert("RGB").save(FIGURES / "job-judge-corpus.webp", quality=85, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", default=["pages", "chain", "words", "texts", "corpora"])
    parser.add_argument("--work", type=Path, default=Path("out/pages"), help="where the jobs write; resumed")
    given = parser.parse_args()
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    (work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    chains = {
        "pages": (STEPS, (draw_reference, draw_prompts, draw_decode, draw_images, draw_words, draw_rare)),
        "chain": (CHAIN, (draw_chain,)),
        "words": (WORDS, (draw_captions,)),
        "texts": (TEXTS, (draw_texts,)),
    }
    if "words" in given.which:
        WORDS[0]["model"] = str(captioner.train(work / "blip"))
    for name, (steps, draws) in chains.items():
        if name in given.which:
            prompts = str(work / "prompts.txt")
            own = [{**step, "input": prompts} if step["name"] == "prompts" else step for step in steps]
            folder = work / ("chain" if name == "pages" else name)
            run_job({"job": "chain", "steps": own}, output=str(folder))
            for draw in draws:
                draw(folder)
    if "corpora" in given.which:
        draw_corpora()


if __name__ == "__main__":
    main()
