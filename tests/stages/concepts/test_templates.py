"""Texts that prompts are put into."""

from __future__ import annotations

import pytest

from jobs.schema.reading import JobFileError, load
from stages.concepts.settings import LegoSettings
from stages.concepts.templates import OBJECT, STYLE, filled


def test_the_lists_are_those_of_textual_inversion():
    assert (len(OBJECT), len(set(OBJECT)), len(STYLE), len(set(STYLE))) == (27, 27, 19, 17)
    assert all(text.count("{}") == 1 for text in OBJECT + STYLE)
    assert (OBJECT[0], OBJECT[13], OBJECT[26]) == (
        "a photo of a {}", "a good photo of the {}", "a photo of a small {}"
    )  # fmt: skip
    assert (STYLE[0], STYLE[7], STYLE[18]) == (
        "a painting in the style of {}", "a picture in the style of {}", "a large painting in the style of {}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("Photo of a <s> that is <c>", "<s> that is <c>"),
        ("Photo of a <s>", "<s>"),
        ("a <c> <s>", "<c> <s>"),
        ("<c> of", "<c> of"),
        ("A picture of the <s>", "<s>"),
        ("an <s>", "<s>"),
        ("photo <c>", "photo <c>"),
        ("another <s>", "another <s>"),
        ("a drawing of a <s>", "drawing of a <s>"),
    ],
)
def test_a_prompt_leaves_its_own_opening_behind(prompt, phrase):
    assert filled(prompt, ["a good photo of the {}"]) == (f"a good photo of the {phrase}",)
    assert filled(prompt, None) == (prompt,)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("objects", "templates 'objects': write object, style, or a list of texts with {} in each"),
        ([], "templates []: write object, style, or a list"),
        (["a photo"], "templates: 'a photo' must hold {} once"),
        (["{} and {}"], "templates: '{} and {}' must hold {} once"),
        (["a {} {concept}"], "and no other braces"),
        (["a {0}"], "must hold {} once"),
        ([3], "templates: 3 must hold {} once"),
        ({"a": "{}"}, "write object, style, or a list"),
    ],
)
def test_what_will_not_do_is_told_in_a_sentence(templates, message):
    job = {"job": "learn-concepts", "input": "concepts/", "model": "m", "learning": {"templates": templates}}
    with pytest.raises(JobFileError) as raised:
        load(job)
    assert message in str(raised.value)
    assert "learning.templates" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_official_baseline_is_a_line_of_a_job_file():
    line = {"separation": False, "context": "none", "templates": "object", "flip": True, "posterior": "sample"}
    job = load({"job": "learn-concepts", "input": "concepts/", "model": "m", "learning": line})
    assert job.learning == LegoSettings(**line)
    assert job.stage().params["settings"].items() >= line.items()
