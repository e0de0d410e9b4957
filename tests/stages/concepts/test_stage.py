"""The stage of learn-concepts: errors are rows, and less is asked for where less is needed."""

from __future__ import annotations

import pytest

from tests.support.concepts import concept_row, pictures, stage_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"with": []}, "0 pictures with the concept"),
        ({"without": pictures(0, 1)}, "1 pictures without the concept"),
        ({"without": None}, "0 pictures without the concept"),
        ({"concept": ""}, "'concept' is empty"),
        ({"concept": "in the"}, "no content word"),
        ({"subject": None}, "a subject has no name"),
        ({"positive": {"frozen": ["cold"]}}, "no positive words for 'ice'"),
        ({"positive": ["cold"]}, "one list for 2 tokens"),
        ({"negative": {"frozen": ["warm"], "ice": ["zebra"]}}, "'zebra' is 5 tokens"),
        ({"negative": {"frozen": ["warm"], "snow": ["red"]}}, "'snow', which is no token of it"),
        ({"positive": '{"frozen": ['}, "no valid JSON"),
        ({"start": {"frozen": "zebra"}}, "'zebra' is 5 tokens"),
        ({"concept": "<frozen> <in> <the> <ice>", "positive": None}, "no positive words"),
        ({"prompt_with": "photo of a {subject}"}, "lacks {concept}"),
        ({"prompt_with": "photo of a {what} {concept}"}, "may hold {subject} and {concept} only"),
        ({"prompt_with": "{concept} " * 30}, "shorten it"),
        ({"with": [b"no picture", b"either"]}, "no readable picture"),
        ({"with": ["missing.png", "gone.png"]}, "does not exist"),
    ],
)
def test_a_bad_concept_is_an_error_row_and_the_others_go_on(folder, changes, message):
    stage = stage_of(folder, settings={"steps": 2, "window": 2}, slots=2)
    rows = {row["id"]: row for row in stage([concept_row(0), concept_row(1, **changes), concept_row(2)])}
    assert [rows[f"concept-{i}"]["status"] for i in range(3)] == ["ok", "failed", "ok"]
    assert message in rows["concept-1"]["error"]
    assert "concept-1" in rows["concept-1"]["error"]
    assert "prepared" not in rows["concept-1"]


def test_without_separation_or_context_less_is_asked_for(folder):
    settings = {"steps": 2, "window": 2, "separation": False, "context": "none", "pictures": 3}
    stage = stage_of(folder, settings=settings)
    (row,) = stage([concept_row(0, without=None, positive=None, negative=None)])
    assert row["status"] == "ok"
    assert row["pictures"] == 2
