"""Prompts a second: the engine against the published recipe in its own form, and what each part contributes.

The published form is written out here as its authors run it: static batches of 64, torch.optim.AdamW, 1000 steps, the
image encoder of transformers with its patch embedding bypassed. Its time a step does not change along the run, so
`--timed` steps are timed and scaled to 1000; that is said in the output. Every line is measured in one run, in turn.

    python -m benchmarks.ovi_speed [--model FOLDER] [--prompts 64] [--timed 10]
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

from benchmarks.ovi_setting import RESULTS, World, asked, cosine, machine, open_world, rows_of, run
from micro import world
from pipeline.spec import Row
from stages import priors
from stages.ovi import token_of_patch
from stages.randomness import row_normal
from stages.recipes import EARLY, OVI, Constraint, Direct, Recipe, Stop


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


def parts(steps: int) -> dict[str, Recipe]:
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


def warm(setting: World, rows: list[Row], donors: int, steps: int) -> list[Row]:
    """The rows, each with the tokens of the nearest of so many other prompts that are solved already."""
    words = np.random.default_rng(1)
    prompts = [world.caption(world.sample_scene(10_000 + i), words, "full") for i in range(donors)]
    solved = run(OVI(steps=steps, slots=64, stop=Stop()), setting, rows_of(setting, prompts)).rows
    t_ME = nn.functional.normalize(torch.from_numpy(np.stack([row["text"] for row in solved])), dim=-1)
    starts = priors.WarmStarts(t_ME, np.stack([row["variable"] for row in solved]))
    return list(starts(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--timed", type=int, default=10, help="steps of the published form that are timed")
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
    model = setting.bench.vision().eval().requires_grad_(False)
    published_form(model, text_BE[:4], ids[:4], 2)  # warm
    started, busy = time.perf_counter(), time.process_time()
    published_form(model, text_BE, ids, options.timed)
    # Time of the process, not of the wall: the machine may be shared, and every line runs on one thread.
    per_prompt = (time.process_time() - busy) / options.timed * 1000 / options.prompts
    wall = (time.perf_counter() - started) / options.timed * 1000 / options.prompts
    lines: dict[str, dict[str, float | None]] = {
        "published form, 1000 steps": {"cpu_seconds": per_prompt, "wall_seconds": wall, "speedup": 1.0, "steps": 1000.0}
    }
    print(f"published: {per_prompt:.2f} CPU s a prompt ({options.timed} steps timed)", flush=True)
    warmed = warm(setting, rows, options.donors, options.steps)
    for name, recipe in parts(options.steps).items():
        run(recipe, setting, rows[:2])
        busy = time.process_time()
        outcome = run(recipe, setting, warmed if "warm" in name else rows)
        seconds = (time.process_time() - busy) / len(rows)
        lines[name] = {
            "cpu_seconds": seconds,
            "wall_seconds": outcome.seconds / len(rows),
            "speedup": per_prompt / seconds,
            "steps": outcome.mean("steps"),
            "true": float(cosine(outcome.z_BE, given.true_BE).mean()),
            "text": float(cosine(outcome.z_BE, text_BE).mean()),
            "occupancy": outcome.occupancy.share if outcome.occupancy else None,
        }
        print(name, {key: value and round(value, 4) for key, value in lines[name].items()}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    about = {
        "machine": machine(),
        "prompts": options.prompts,
        "timed_steps_of_published": options.timed,
        "lines": lines,
    }
    (RESULTS / "ovi_speed.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
