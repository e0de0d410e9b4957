"""Latents of concepts from an inversion dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.rare.inverted import InvertedDataset
from stages.rare.references import read_concept_row
from tests.support.rare import inverted


def test_seeds_are_found_by_name_or_by_id(tmp_path: Path) -> None:
    dataset = InvertedDataset(inverted(tmp_path / "out", "abc"), "concept", "abc")
    asked = [
        read_concept_row(key, {"id": key, "prompt": "x", **row}, 3)
        for key, row in {
            "star": {}, "other": {"name": "ring"}, "listed": {"seeds": ["p6", "p0"]}, "gone": {"seeds": '["p1"]'},
            "moon": {},
        }.items()
    ]  # fmt: skip
    found = dataset.find(asked, (4, 1, 1), 3)
    ids = {key: value if isinstance(value, str) else value.ids for key, value in found.items()}
    assert ids["star"] == ("p0", "p2", "p3")  # the failed one is none, and three are enough
    assert ids["other"] == ("p5", "p6")
    assert ids["listed"] == ("p6", "p0")
    assert "no inverted row 'p1'" in ids["gone"]
    assert "no inverted row with concept 'moon'" in ids["moon"]
    star = found["star"]
    assert not isinstance(star, str)
    assert star.z_KCHW[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert "another size" in str(dataset.find(asked[:1], (3, 1, 1), 3)["star"])


def test_an_inversion_dataset_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another model"):
        InvertedDataset(inverted(tmp_path / "model", "abc"), "concept", "def")
    with pytest.raises(ValueError, match="inverted with sampler: model, and this job draws with sampler: null"):
        InvertedDataset(inverted(tmp_path / "sampler", "abc", sampler="model"), "concept", "abc")
    InvertedDataset(str(tmp_path / "sampler"), "concept", "abc", "model")
    with pytest.raises(ValueError, match="2 methods"):
        InvertedDataset(inverted(tmp_path / "two", "abc", methods=("lbo", "ddim")), "concept", "abc")
    with pytest.raises(ValueError, match="no finished output"):
        InvertedDataset(str(tmp_path), "concept", "abc")
    nameless = InvertedDataset(inverted(tmp_path / "nameless", "abc", by="label"), "concept", "abc")
    found = nameless.find([read_concept_row("star", {"id": "star", "prompt": "x"}, 3)], (4, 1, 1), 3)
    assert "has no column 'concept'" in str(found["star"])
