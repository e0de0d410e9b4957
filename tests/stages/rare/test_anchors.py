"""Anchors found among the captions of a reference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.models.clip import TextEncoder
from stages.rare.anchors import AnchorFinder, keeps_the_rest
from stages.rare.settings import AapbGuide, Anchors, PlainGuide, RandomMethod, RareConceptsSettings
from stages.rare.stage import RareConcepts
from tests.support import tiny_stable_diffusion

CAPTIONS = {
    "a yellow circle": 6, "A red heart": 5, "a yellow star": 4, "a yellow heart": 9, "a green star": 30,
    "a yellow heart on a beige background": 8, "a  red  HEART": 2,
}  # fmt: skip


def reference(folder: Path, clip: str, column: str = "caption", captioned: int = 64) -> str:
    """What anchors are found in of a finished reference: facts, and its rows' captions."""
    (folder / "reference").mkdir(parents=True)
    (folder / "data").mkdir()
    facts = {"captions": {"captioned": captioned}, "text_encoder": {"path": clip, "revision": ""}}
    (folder / "reference" / "reference.json").write_text(json.dumps(facts))
    texts = [text for text, count in CAPTIONS.items() for _ in range(count)]
    pq.write_table(pa.table({"id": [str(n) for n in range(len(texts))], column: texts}), folder / "data/part-0.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("a yellow circle", True), ("an Orange heart", True), ("a heart", True), ("yellow", True),
        ("a yellow heart", False), ("the yellow heart", False), ("a red circle", False), ("heart yellow", False),
        ("a yellow heart on grey", False), ("a big yellow heart", False), ("", False),
    ],
)  # fmt: skip
def test_an_anchor_keeps_all_but_one_word(caption: str, kept: bool) -> None:
    assert keeps_the_rest("a yellow heart", caption) is kept


def test_keeping_the_rest_is_one_edit_of_the_words() -> None:
    """Against a list of all edits, over random texts of up to four of three words."""
    random = np.random.default_rng(0)
    for _ in range(400):
        asked, found = (list(random.choice(["x", "y", "z"], random.integers(1, 5))) for _ in range(2))
        one = [(asked[:n] + found[n : n + 1] + asked[n + 1 :]) for n in range(len(asked))]
        one += [asked[:n] + asked[n + 1 :] for n in range(len(asked))]
        expected = found in one and found != asked and len(asked) > 1
        assert keeps_the_rest(" ".join(asked), " ".join(found)) is expected, (asked, found)


def test_the_nearest_of_the_frequent_ones_is_taken(clip: str, tmp_path: Path) -> None:
    finder = AnchorFinder(Anchors(reference=reference(tmp_path / "out", clip), min_rows=5), "cpu")
    found = finder.find("a yellow heart")
    t_AT = TextEncoder(clip)(["a yellow heart", "a yellow circle", "a red heart"]).double().numpy()
    cosines = [float(t_AT[0] @ t / np.linalg.norm(t_AT[0]) / np.linalg.norm(t)) for t in t_AT[1:]]
    best = int(np.argmax(cosines))
    assert found is not None
    assert (found.text, found.count) == (("a yellow circle", 6), ("a red heart", 7))[best]
    assert found.distance == pytest.approx(1 - cosines[best])
    assert finder.find("a checkered purple moon") is None


def test_rows_say_which_anchor_was_found_and_their_own_one_wins(clip: str, tmp_path: Path) -> None:
    model = tiny_stable_diffusion.build(tmp_path / "sd", "sd")
    settings = RareConceptsSettings(
        model=model, encoder=clip, methods=(RandomMethod(),), guides=(PlainGuide(), AapbGuide()), steps=2,
        scores=("text",), anchors=Anchors(reference=reference(tmp_path / "out", clip), min_rows=6), device="cpu",
    )  # fmt: skip
    assert RareConcepts.describe(settings).models["anchors"]["path"] == str(tmp_path / "out")
    given = {"found": {"prompt": "a yellow heart"}, "own": {"prompt": "a yellow heart", "anchor": "a yellow star"},
             "none": {"prompt": "a checkered purple moon"}}  # fmt: skip
    rows = [
        {"id": f"{name}/random/{guide}/0", "name": name, "method": "random", "guide": guide, "number": "0", **own}
        for name, own in given.items() for guide in ("plain", "aapb")
    ]  # fmt: skip
    done = {row["id"]: row for row in RareConcepts(settings)(rows)}
    found = done["found/random/aapb/0"]
    assert found["anchor"] in ("a yellow circle", "a red heart")
    assert found["anchor_count"] in (6, 7)
    assert 0 < found["anchor_distance"] < 2
    own = done["own/random/aapb/0"]
    assert (own["anchor"], own.get("anchor_distance"), own.get("anchor_count")) == ("a yellow star", None, None)
    assert done["found/random/plain/0"].get("anchor_distance") is None
    assert done["none/random/plain/0"]["status"] == "ok"
    said = r"aapb needs the column 'anchor'.*no caption that 6 rows of .* have is the prompt with one word"
    assert re.search(said, done["none/random/aapb/0"]["error"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"captioned": 0}, "anchors: the reference .* has no captions: make one with `captions: true`"),
        ({"column": "note"}, "holds none of the columns prompt, caption, text.*`keep: .caption.`"),
    ],
)
def test_a_reference_without_captions_is_refused_at_planning(
    change: dict[str, object], said: str, clip: str, tmp_path: Path
) -> None:
    out = reference(tmp_path / "out", clip, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        AnchorFinder(Anchors(reference=out), "cpu")


def test_what_is_no_output_is_refused(clip: str, tmp_path: Path) -> None:
    out = reference(tmp_path / "out", clip)
    with pytest.raises(ValueError, match=r"anchors: .*out/reference has no folder data; name the output of the run"):
        AnchorFinder(Anchors(reference=f"{out}/reference"), "cpu")


def test_anchors_that_nobody_draws_by_are_refused(clip: str, tmp_path: Path) -> None:
    model = tiny_stable_diffusion.build(tmp_path / "sd", "sd")
    settings = RareConceptsSettings(
        model=model, encoder=clip, methods=(RandomMethod(),), scores=("text",),
        anchors=Anchors(reference=reference(tmp_path / "out", clip)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="anchors: no guide draws by one"):
        RareConcepts.describe(settings)
