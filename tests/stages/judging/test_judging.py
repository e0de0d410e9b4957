"""What trainings are made of, and what is made of them: against plain loops and closed forms."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from stages.judging.measures import by_class, estimate, group_of, judgement, mean_of
from stages.judging.mixture import mix, repeated
from stages.judging.network import build, check
from stages.judging.sets import PictureSet
from stages.judging.settings import Judging
from stages.judging.training import Heads, predict, rise_and_fall, train


@pytest.mark.parametrize(("count", "wanted"), [(5, 3), (5, 5), (5, 13), (1, 4), (7, 21)])
def test_pictures_are_repeated_as_evenly_as_can_be(count: int, wanted: int) -> None:
    numbers = repeated(count, wanted, np.random.default_rng(0)).tolist()
    often = [numbers.count(n) for n in range(count)]
    assert len(numbers) == wanted
    assert max(often) - min(often) <= 1


def pictures(name: str, count: int, colour: int) -> PictureSet:
    x_NHWC = np.full((count, 8, 8, 3), colour, np.uint8)
    x_NHWC[:, 0, 0, 0] = np.arange(count)
    return PictureSet([f"{name}{n}" for n in range(count)], [(name,)] * count, x_NHWC, 0)


def test_a_mixture_holds_every_real_picture_and_so_many_of_the_corpus() -> None:
    real, corpus = pictures("real", 6, 10), pictures("corpus", 4, 200)
    mixture = mix(real, corpus, [1, 3], 5, np.random.default_rng(0))
    x_MHWC, labels = mixture.pictures(np.arange(len(mixture))), mixture.labels()
    assert labels == [("real",)] * 6 + [("corpus",)] * 5
    assert x_MHWC[:6, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(set(x_MHWC[6:, 0, 0, 0].tolist())) == [1, 3]
    assert (x_MHWC[:6, 1, 1] == 10).all()
    assert (x_MHWC[6:, 1, 1] == 200).all()
    backwards = mixture.pictures(np.array([10, 0]))
    assert np.array_equal(backwards, x_MHWC[[10, 0]])


def test_the_rate_rises_and_falls() -> None:
    shares = [rise_and_fall(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert shares[10:] == pytest.approx([(1 + math.cos(math.pi * n / 90)) / 2 for n in range(90)])
    assert [rise_and_fall(step, 1) for step in range(1)] == [1.0]


def test_a_label_that_no_head_knows_is_never_right() -> None:
    heads = Heads([("red", "star"), ("blue", "ring")])
    assert heads.values == [["blue", "red"], ["ring", "star"]]
    assert heads.encode([("red", "ring"), ("violet", "star")]).tolist() == [[1, 0], [-1, 1]]
    assert heads.knows(("blue", "star"))
    assert not heads.knows(("violet", "star"))


def test_the_same_trial_gives_the_same_classifier_and_another_one_another() -> None:
    dark, bright = pictures("dark", 6, 20), pictures("bright", 6, 230)
    mixture = mix(dark, bright, range(6), 6, np.random.default_rng(0))
    heads, settings = Heads([("dark",), ("bright",)]), Judging(size=8, epochs=4, batch_size=4)
    nets = [train(mixture, heads, settings, seed=1, trial=trial, device="cpu")[0] for trial in ("0", "0", "1")]
    first, again, other = (torch.cat([p.flatten() for p in net.state_dict().values()]) for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert predict(nets[0], mixture.pictures(np.array([0, 11])), heads, "cpu").tolist() == [[1], [0]]


def test_classes_count_the_same_however_many_pictures_they_have() -> None:
    classes = by_class([("a",), ("a",), ("a",), ("b",)], [True, False, False, True])
    assert classes == {"a": (1, 3), "b": (1, 1)}
    assert mean_of(classes, ["a", "b"]) == pytest.approx((1 / 3 + 1) / 2)
    assert mean_of(classes, []) is None
    assert [group_of(n, 5) for n in (0, 1, 5, 6)] == ["never", "rare", "rare", "frequent"]


def test_intervals_are_as_wide_as_theory_says() -> None:
    """One trial: the mean of K drawn again is normal with the classes' deviation over sqrt(K)."""
    share_TK = np.random.default_rng(3).uniform(0, 1, (1, 200))
    found = estimate(share_TK)
    half = 1.96 * share_TK.std() / math.sqrt(200)
    assert found.mean == pytest.approx(share_TK.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.005)


def test_trials_that_differ_widen_an_interval() -> None:
    classes_alone = np.tile(np.linspace(0, 1, 50), (3, 1))
    both = np.clip(classes_alone + np.array([[-0.3], [0], [0.3]]), 0, 1)
    wide, narrow = estimate(both), estimate(classes_alone)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_gain_is_taken_by_pairs() -> None:
    base = {"0": {"a": 0.1, "b": 0.9}, "1": {"a": 0.2, "b": 1.0}}
    better = {trial: {own: share + 0.05 for own, share in classes.items()} for trial, classes in base.items()}
    groups = {"a": "rare", "b": "rare"}
    found = judgement({"plain": base, "grown": better, "died": {}}, groups, "plain")  # type: ignore[arg-type]
    gain = found["grown"]["rare"]["difference"]
    assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx((0.05, 0.05, 0.05))
    assert found["plain"]["rare"]["high"] - found["plain"]["rare"]["low"] > 0.5
    assert "difference" not in found["plain"]["rare"]
    assert found["died"] == {}


def test_classifiers_of_other_libraries_are_asked_for_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision and timm are no part of the test environment: what is asked of them is compared with their docs."""
    asked = []

    def model(name: str, **options: object) -> torch.nn.Module:
        asked.append((name, options))
        return torch.nn.Identity()

    models, timm = ModuleType("torchvision.models"), ModuleType("timm")
    models.__dict__.update(get_model=model, list_models=lambda module: ["resnet18", "googlenet"])
    timm.__dict__.update(create_model=model, list_models=lambda: ["resnet10t"])
    named = {"torchvision": SimpleNamespace(models=models), "torchvision.models": models, "timm": timm}
    for name, module in named.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("stages.judging.network.find_spec", lambda name: True)
    for name in ("torchvision/resnet18", "timm/resnet10t"):
        check(name)
        build(name, 7)
    assert asked == [
        ("resnet18", {"weights": None, "num_classes": 7}), ("resnet10t", {"pretrained": False, "num_classes": 7}),
    ]  # fmt: skip
    for name in ("torchvision/resnet10t", "torchvision/googlenet"):
        with pytest.raises(ValueError, match=f"torchvision has no model '{name.partition('/')[2]}'"):
            check(name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm cannot be loaded"):
        check("timm/resnet10t")


def test_the_small_network_takes_pictures_of_any_size() -> None:
    net = build("small", 5).eval()
    for side in (8, 64, 100):
        assert net(torch.zeros(2, 3, side, side)).shape == (2, 5)
