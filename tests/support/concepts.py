"""Concepts for tests in which meaning does not matter: words of the tiny tokenizer, pictures of noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

from stages.concepts.prepare import prepare
from stages.concepts.problem import LegoProblem
from stages.concepts.settings import LearnConceptsSettings, Templates
from stages.concepts.stage import LearnConcepts
from stages.engine.solver import solve
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.support.tiny_stable_diffusion import WORDS


def opened(folder, dtype="float32"):
    return open_latent_model(LatentModelSettings(model=folder, device="cpu", dtype=dtype))


def pictures(seed: int, count: int = 2) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)) for _ in range(count)]


def concept_row(number: int, **changes) -> dict:
    words = [w for w in WORDS if len(w) > 3]
    row = {
        "id": f"concept-{number}",
        "concept": "frozen in ice",
        "subject": words[number % len(words)],
        "with": pictures(2 * number, 2 + number % 2),
        "without": pictures(2 * number + 1, 2),
        "start": {"frozen": words[(number + 3) % len(words)], "ice": "thing"},
        "positive": {"frozen": ["cold", "blue"], "ice": ["plain", "cold", "small"]},
        "negative": {"frozen": ["warm", "melted"], "ice": ["red"]},
    }
    return row | changes


def learn(model, rows, settings, slots, **options):
    problem = LegoProblem(model, settings, slots=slots, max_words=4, seed=7, **options)
    ready = ({**row, "prepared": prepare(row, model, settings, Templates(), max_words=4, root="")} for row in rows)
    return {row["id"]: row for row in solve(problem, ready)}


def stage_of(folder, **options):
    return LearnConcepts(LearnConceptsSettings(model=folder, **{"device": "cpu", **options}))
