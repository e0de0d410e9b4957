"""Concepts as their authors write them."""

from __future__ import annotations

import json

import pytest

from stages.concepts.concept import ConceptError, read_concept
from stages.concepts.prepare import prepare
from stages.concepts.settings import LegoSettings, Templates
from tests.support.concepts import concept_row, learn, pictures


def test_several_subjects_have_a_token_each(model):
    row = concept_row(0)
    subjects = [
        {"name": n, "with": pictures(i), "without": pictures(9 + i)} for i, n in enumerate(("red star", "robot"))
    ]
    row = {k: v for k, v in row.items() if k not in ("subject", "with", "without")} | {"subjects": subjects}
    concept = read_concept(row, Templates())
    assert concept.tokens == ("<concept-0-1>", "<concept-0-2>")
    assert concept.subject_tokens == ("<concept-0-subject-1>", "<concept-0-subject-2>")
    prompts = [prompt for _, prompt, _ in concept.examples(True)]
    assert prompts[0] == "Photo of a <concept-0-subject-1> that is <concept-0-1> in <concept-0-2>"
    assert prompts[-1] == "Photo of a <concept-0-subject-2>"
    learned = learn(model, [row], LegoSettings(steps=4, window=4), slots=1)[row["id"]]
    assert json.loads(learned["words"]) == ["frozen", "ice", "red star", "robot"]
    with pytest.raises(ConceptError, match="max_words is 3"):
        prepare(row, model, LegoSettings(), Templates(), max_words=3, root="")
