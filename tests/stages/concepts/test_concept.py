"""Concepts as their authors write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from stages.concepts.concept import ConceptError, open_picture, read_concept
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
    prompts = [prompt for _, (prompt,), _ in concept.examples(True)]
    assert prompts[0] == "Photo of a <concept-0-subject-1> that is <concept-0-1> in <concept-0-2>"
    assert prompts[-1] == "Photo of a <concept-0-subject-2>"
    learned = learn(model, [row], LegoSettings(steps=4, window=4), slots=1)[row["id"]]
    assert json.loads(learned["words"]) == ["frozen", "ice", "red star", "robot"]
    with pytest.raises(ConceptError, match="max_words is 3"):
        prepare(row, model, LegoSettings(), Templates(), max_words=3, root="")


def test_a_picture_outside_the_folder_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    """A concept table may come from a stranger: its pictures lie below its folder, or where the job file says."""
    (tmp_path / "in").mkdir()
    for place in (tmp_path / "away.png", tmp_path / "in" / "own.png"):
        Image.new("RGB", (8, 8), "red").save(place)
    root, away = str(tmp_path / "in"), str(tmp_path / "away.png")
    for value in (away, "../away.png", f"file://{away}", {"bytes": None, "path": away}, "http://127.0.0.1:9/a.png"):
        with pytest.raises(ConceptError, match="say so in the job file"):
            open_picture(value, root)
    with pytest.raises(ConceptError, match="is no public address"):
        open_picture("http://127.0.0.1:9/a.png", root, ["http://"])
    for value, allow in (("own.png", ()), (f"{root}/own.png", ()), (away, (str(tmp_path),))):
        assert open_picture(value, root, allow).size == (8, 8)


def test_a_picture_is_seen_as_a_row_s_picture_is(tmp_path: Path) -> None:
    """White behind what is transparent (it was black)."""
    cut = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    cut.paste((200, 10, 10, 255), (4, 0, 8, 8))
    cut.save(tmp_path / "cut.png")
    found = open_picture("cut.png", str(tmp_path))
    assert (found.getpixel((0, 0)), found.getpixel((6, 4))) == ((255, 255, 255), (200, 10, 10))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 10, 200, 10])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert open_picture("palette.png", str(tmp_path)).getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ConceptError, match=r"empty\.png.*zero bytes"):
        open_picture("empty.png", str(tmp_path))
