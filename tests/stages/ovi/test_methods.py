"""OVI and `direct` on a tiny model, and what every method has in common."""

import numpy as np
import pytest
import torch

from pipeline.contract import failed
from stages.ovi.context import Context
from stages.ovi.methods import build
from stages.ovi.settings import OVI, Constraint, Direct, Retrieval, Stop, TextEmbedding, TrainedPrior
from tests.support.prompt_methods import run
from tests.support.tiny_kandinsky import WIDTH


def test_constraints_pull_towards_the_images(context, rows):
    free = run(OVI(steps=40, slots=2, stop=Stop()), context, rows)
    near = run(OVI(steps=40, slots=2, stop=Stop(), constraint=Constraint(neighbours=2.0, k=3)), context, rows)
    typical = run(OVI(steps=40, slots=2, stop=Stop(), constraint=Constraint(mahalanobis=0.5)), context, rows)

    def mean(found, measure):
        return np.mean([measure(torch.from_numpy(row["embedding"])[None]) for row in found.values()])

    def nearest(z):
        return float(context.reference.neighbours(z, 3).cos_BK.mean())

    def distance(z):
        return float(context.reference.mahalanobis(z)) / WIDTH

    assert mean(near, nearest) > mean(free, nearest) + 0.05
    assert mean(typical, distance) < mean(free, distance) - 0.05
    assert all(free[i]["passes"] == 41 for i in free)
    assert context.occupancy["ovi"].rows == 3 * len(rows)


def test_direct_needs_no_encoder_and_stops(context, rows):
    got = run(Direct(), context, rows)
    for row in rows:
        found = got[row["id"]]
        assert found["passes"] == 0
        assert 5 < found["steps"] <= 200
        assert found["mahalanobis"] < float(context.reference.mahalanobis(torch.from_numpy(row["text"])[None])) / WIDTH


def test_a_target_cosine_stops_a_row(context, rows):
    got = run(OVI(steps=300, stop=Stop(target=0.6)), context, rows)
    reached = [row for row in got.values() if row["stopped"] == "reached"]
    assert len(reached) >= 3
    assert all(row["text_cosine"] >= 0.6 and row["steps"] < 300 for row in reached)
    assert len({row["steps"] for row in reached}) > 1


def test_failed_rows_pass_every_method(context, rows):
    mixed = [failed({"id": "bad", "prompt": "x"}, "no"), *rows]
    for method in (
        TextEmbedding(rescale=True), Retrieval(k=2), TrainedPrior(steps=2), Direct(steps=2), OVI(steps=2)
    ):  # fmt: skip
        got = run(method, context, mixed)
        assert len(got) == len(mixed)
        assert got["bad"]["error"] == "no"


def test_methods_say_what_they_lack(context, prior):
    poor = Context(prior, None, "cpu", 0, context.vision, context.text, None)
    for method in (Retrieval(), Direct(), TextEmbedding(rescale=True), OVI(constraint=Constraint(neighbours=1.0))):
        with pytest.raises(ValueError, match="reference"):
            build(method, poor)
    with pytest.raises(ValueError, match="prior pipeline"):
        build(TrainedPrior(model="/nowhere"), poor)
    with pytest.raises(ValueError, match="PriorTransformer"):
        build(TrainedPrior(prior="/nowhere"), poor)
