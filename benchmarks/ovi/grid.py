"""The rows of `latentmill compbench` in one process, a cell at a time: what is done is kept, and a second call goes on.

A cell is one method, category and draw over one bank. Ids, seed, decoder noise and settings are the command's own, so
that a cell holds the numbers that its rows would (`tests/benchmarks/test_grid.py`). Cells go by draw, method, category;
one of fewer prompts than are asked for now is continued.

    latentmill run-job benchmarks/ovi/captioned.yaml --output out/captioned
    OMP_NUM_THREADS=1 python -m benchmarks.ovi.grid out/captioned --bank 20000 --methods kernel-rescaled,trained-prior
    python -m benchmarks.ovi.grid --bank 20000 --table
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import micro
from benchmarks.ovi.setting import RESULTS, machine
from jobs.commands.compbench import DEFAULT_JOB, Scores, compare, tabulate
from micro import prompts
from pipeline.contract import Row
from stages.models.decoding import Decode
from stages.ovi.context import RowMap
from stages.ovi.settings import InvertPromptsSettings, PromptInversion, PromptMethod
from stages.ovi.stage import InvertPrompts

KEPT = ("bound", "success", "clip_score", "norm", "nearest_cosine", "text_cosine", "passes")
Cell = dict[str, list[float]]
"""Measure -> a number for each prompt, in the set's order."""


def methods() -> dict[str, PromptMethod]:
    """Those of the job that the command runs by default."""
    import yaml

    config = yaml.safe_load(DEFAULT_JOB.read_text())
    return {one.label: one for one in PromptInversion(reference="given", methods=config["methods"]).methods}


def rows_of(category: str, draw: int, label: str) -> list[Row]:
    """A category's prompts, under the ids that the command gives their rows."""
    return [
        {**asdict(prompt), "id": f"{prompt.id}/{draw}/{label}", "method": label} for prompt in prompts.load(category)
    ]


def stage_of(method: PromptMethod, reference: str | None) -> InvertPrompts:
    settings = InvertPromptsSettings(
        encoder=str(micro.MODELS / "prior"), methods=(method,), reference=reference, decoder=Decode(steps=20),
        scores=("clip", "oracle"),
    )  # fmt: skip
    return InvertPrompts(settings, device="cpu")


def clocked(method: RowMap, spent: list[float]) -> RowMap:
    """The same method; the processor seconds of each stretch of its own work are appended to a list, those in which it
    is given rows (and their texts are encoded) as negative ones, since they lie within."""

    def run(rows: Iterable[Row]) -> Iterator[Row]:
        return _clocked(method(_clocked(iter(rows), spent, -1)), spent, 1)

    return run


def _clocked(rows: Iterator[Row], spent: list[float], sign: int) -> Iterator[Row]:
    while True:
        begun = time.process_time()
        row = next(rows, None)
        spent.append(sign * (time.process_time() - begun))
        if row is None:
            return
        yield row


def filled(stage: InvertPrompts, rows: list[Row]) -> Cell:
    """What the judges say of each row, in the prompts' order; the processor's milliseconds a row, for its embedding
    (without the text encoder) and for everything.

    Raises:
        ValueError: A row failed.
    """
    label, spent = rows[0]["method"], [0.0]
    plain = stage.methods[label]
    stage.methods[label] = clocked(plain, spent)
    begun = time.process_time()
    found = {row["id"]: row for row in stage(rows)}
    whole = time.process_time() - begun
    stage.methods[label] = plain
    bad = next((row for row in found.values() if row["status"] != "ok"), None)
    if bad is not None:
        raise ValueError(f"{bad['id']}: {bad['error']}")
    cell: Cell = {
        name: [round(float(found[row["id"]][name]), 5) for row in rows]
        for name in KEPT
        if found[rows[0]["id"]].get(name) is not None
    }
    count = len(rows)
    return {**cell, "milliseconds": [1000 * sum(spent) / count] * count, "with_picture": [1000 * whole / count] * count}


def wanted(labels: Sequence[str], categories: Sequence[str], draws: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    return ((label, category, draw) for draw in draws for label in labels for category in categories)


def tables(cells: dict[str, Cell], categories: Sequence[str], limit: int | None = None) -> str:
    """The command's own tables of all cells of some categories; draws of a prompt are averaged first.

    Args:
        limit: Prompts a category that count, so that methods which were drawn for more of them stand beside the others.
    """
    drawn: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    summary: dict[str, dict[str, list[float]]] = {}
    pictures: dict[str, int] = {}
    for key, cell in cells.items():
        label, category, _ = key.split("/")
        if category not in categories:
            continue
        cell = {name: values[:limit] for name, values in cell.items()}
        pictures[label] = pictures.get(label, 0) + len(cell["bound"])
        for prompt, value in zip(prompts.load(category), cell["bound"], strict=False):
            drawn.setdefault((label, category, "bound"), {}).setdefault(prompt.id, []).append(value)
        for name in ("success", "clip_score", "nearest_cosine", "passes"):
            summary.setdefault(label, {}).setdefault(name, []).extend(cell.get(name, []))
        summary[label].setdefault("seconds_per_prompt", []).extend(ms / 1000 for ms in cell["milliseconds"])
    scores: Scores = {
        key: {prompt: float(np.mean(values)) for prompt, values in of.items()} for key, of in drawn.items()
    }
    means = {
        label: {name: float(np.mean(values)) if values else None for name, values in found.items()}
        for label, found in summary.items()
    }
    told = "; ".join(f"{label}: {count}" for label, count in pictures.items())
    note = f"Pictures: {told}. Seconds are a processor's, without the text encoder."
    return f"{tabulate(scores, means)}\n{note}\n\n{compare(scores)}"


def written(file: Path, every: dict[str, Cell], limit: int | None = None) -> None:
    """The cells that hold something, and their tables."""
    cells = {key: cell for key, cell in every.items() if cell}
    file.write_text(json.dumps({"machine": machine(), "cells": cells}) + "\n")
    parts = [
        f"# {title}\n\n{tables(cells, of, limit)}"
        for title, of in {"The six categories": prompts.COMPBENCH, "Rare and never seen": ("rare", "never")}.items()
        if any(key.split("/")[1] in of for key in cells)
    ]
    file.with_suffix(".md").write_text("\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", nargs="?", help="a captioned reference")
    parser.add_argument("--bank", required=True, help="its name in results/: grid_<bank>.json and .md")
    parser.add_argument("--methods", default="", help="of the job's, with commas")
    parser.add_argument("--categories", default=",".join(prompts.COMPBENCH))
    parser.add_argument("--draws", default="0", help="which of the command's draws, with commas")
    parser.add_argument("--limit", type=int, help="prompts a category, drawn or in the table")
    parser.add_argument("--until", help="start no cell after this time of the day, HH:MM")
    parser.add_argument("--table", action="store_true", help="write the tables again, of what there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / f"grid_{options.bank}.json"
    cells: dict[str, Cell] = json.loads(file.read_text())["cells"] if file.exists() else {}
    every, stage = methods(), None
    labels = [] if options.table else options.methods.split(",")
    draws = [int(draw) for draw in options.draws.split(",")]
    for label, category, draw in wanted(labels, options.categories.split(","), draws):
        cell = cells.setdefault(f"{label}/{category}/{draw}", {})
        rows = rows_of(category, draw, label)[len(cell.get("bound", [])) : options.limit]
        if not rows:
            continue
        if options.until and time.strftime("%H:%M") >= options.until:
            break
        if stage is None or label not in stage.methods:
            stage = stage_of(every[label], options.reference)
        for name, values in filled(stage, rows).items():
            cell.setdefault(name, []).extend(values)
        written(file, cells)
        print(time.strftime("%H:%M:%S"), label, category, draw, flush=True)
    written(file, cells, options.limit if options.table else None)


if __name__ == "__main__":
    main()
