"""Prompts a second: the engine against the published recipe in its own form, and what each part contributes.

The published form is written out here as its authors run it: static batches of 64, torch.optim.AdamW, 1000 steps, the
image encoder of transformers with its patch embedding bypassed. Every line is measured in one run, in turn: first the
engine stopped before the drift, then the engine run until its rows have the published run's mean objective.

    python -m benchmarks.ovi.speed [--model FOLDER] [--prompts 64]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.ovi.setting import RESULTS, World, asked, cosine, machine, open_world, rows_of, run
from micro import world
from pipeline.contract import Row
from stages.engine.randomness import row_normal
from stages.models.vision_tower import token_of_patch
from stages.ovi.settings import EARLY, OVI, Constraint, Direct, PromptMethod, Stop
from stages.ovi.warm_starts import WarmStarts


def published_form(
    model: nn.Module, text_BE: torch.Tensor, ids: list[str], steps: int, tokens: int = 4
) -> torch.Tensor:
    """Cross the Gap's loop on one static batch; z_BE after `steps`."""
    vision: Any = model.vision_model
    embeddings = vision.embeddings
    take_N = token_of_patch(embeddings.num_patches, tokens)
    w_BPD = nn.Parameter(0.02 * row_normal((tokens, embeddings.embed_dim), 0, ids, "tokens"))
    adam = torch.optim.AdamW([w_BPD], lr=2e-2, weight_decay=0.01)

    def encode() -> torch.Tensor:
        h = torch.cat([embeddings.class_embedding.expand(len(ids), 1, -1), w_BPD[:, take_N]], dim=1)
        h = vision.pre_layrnorm(h + embeddings.position_embedding.weight)
        h = vision.encoder(inputs_embeds=h).last_hidden_state[:, 0]
        return model.visual_projection(vision.post_layernorm(h))

    for _ in range(steps):
        adam.zero_grad()
        loss = (1 - nn.functional.cosine_similarity(encode(), text_BE, dim=-1)).mean()
        loss.backward()
        adam.step()
    with torch.no_grad():
        return encode()


def parts(steps: int) -> dict[str, PromptMethod]:
    """The engine, one part after another, up to so many steps a row."""
    stop = EARLY
    return {
        f"fixed budget of {steps} steps, one batch": OVI(steps=steps, slots=64, stop=Stop()),
        "+ each row stops by itself, one batch": OVI(steps=steps, slots=64, stop=stop),
        "+ freed slots refilled (16 slots)": OVI(steps=steps, slots=16, stop=stop),
        "+ warm start (full tokens)": OVI(steps=steps, slots=16, stop=stop),
        "+ compact tokens (cold)": OVI(steps=steps, slots=16, stop=stop, compact=True),
        "direct (no encoder), Mahalanobis": Direct(constraint=Constraint(mahalanobis=1.0)),
    }


def drifted(objective: float) -> dict[str, PromptMethod]:
    """The engine, each row up to the cosine to its text that the published run ends with on average."""
    stop = Stop(target=objective)
    return {
        "to the published objective": OVI(steps=1000, slots=16, stop=stop),
        "to the published objective, rate 0.1": OVI(steps=1000, slots=16, stop=stop, lr=1e-1),
        "to the published objective, compact": OVI(steps=1000, slots=16, stop=stop, compact=True),
        "to the published objective, compact, 16 tokens, rate 0.1":
            OVI(steps=1000, slots=16, stop=stop, compact=True, tokens=16, lr=1e-1),
    }  # fmt: skip


def warm(setting: World, rows: list[Row], donors: int, steps: int) -> list[Row]:
    """The rows, each with the tokens of the nearest of so many other prompts that are solved already."""
    words = np.random.default_rng(1)
    prompts = [world.caption(world.sample_scene(10_000 + i), words, "full") for i in range(donors)]
    solved = run(OVI(steps=steps, slots=64, stop=Stop()), setting, rows_of(setting, prompts)).rows
    t_ME = nn.functional.normalize(torch.from_numpy(np.stack([row["text"] for row in solved])), dim=-1)
    starts = WarmStarts(t_ME, np.stack([row["variable"] for row in solved]))
    return list(starts(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="most steps of the engine")
    parser.add_argument("--donors", type=int, default=64, help="prompts solved beforehand, for warm starts")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting: World = open_world(options.model, options.rows, options.cache)
    given = asked(setting, "heldout", options.prompts)
    rows = rows_of(setting, given.prompts)
    text_BE = torch.from_numpy(np.stack([row["text"] for row in rows]))
    ids = [row["id"] for row in rows]
    model = setting.context.vision().eval().requires_grad_(False)
    published_form(model, text_BE[:4], ids[:4], 2)  # warm
    lines: dict[str, dict[str, Any]] = {}

    def note(name: str, z_BE: torch.Tensor, cpu: float, wall: float, steps: float | None, share: float | None) -> None:
        # Time of the process, not of the wall: the machine may be shared, and every line runs on one thread.
        mine = cpu / len(rows)
        lines[name] = {
            "cpu_seconds": mine,
            "wall_seconds": wall / len(rows),
            "speedup": next(iter(lines.values()))["cpu_seconds"] / mine if lines else 1.0,
            "steps": steps,
            "true": float(cosine(z_BE, given.true_BE).mean()),
            "text": float(cosine(z_BE, text_BE).mean()),
            "occupancy": share,
        }
        print(name, {key: value and round(value, 4) for key, value in lines[name].items()}, flush=True)

    started, busy = time.perf_counter(), time.process_time()
    batches = [slice(first, first + 64) for first in range(0, len(ids), 64)]
    z_BE = torch.cat([published_form(model, text_BE[batch], ids[batch], 1000) for batch in batches])
    note("published form", z_BE, time.process_time() - busy, time.perf_counter() - started, 1000.0, None)
    warmed = warm(setting, rows, options.donors, options.steps)
    for name, method in {**parts(options.steps), **drifted(lines["published form"]["text"])}.items():
        run(method.model_copy(update={"steps": 2}), setting, rows[:2])
        busy = time.process_time()
        outcome = run(method, setting, warmed if "warm" in name else rows)
        share = outcome.occupancy.share if outcome.occupancy else None
        note(name, outcome.z_BE, time.process_time() - busy, outcome.seconds, outcome.mean("steps"), share)
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": machine(), "prompts": options.prompts, "lines": lines}
    (RESULTS / "ovi_speed.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
