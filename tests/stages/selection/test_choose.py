"""Which candidates are kept, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from stages.selection.choose import JITTER, Candidates, choose
from stages.selection.settings import SelectionSettings

RNG = np.random.default_rng(0)


def candidates(z_NE: np.ndarray, score_N: np.ndarray | None = None, **copies: str) -> Candidates:
    ids = [f"p{n:02d}" for n in range(len(z_NE))]
    return Candidates(ids, z_NE, score_N, [copies.get(own) for own in ids])


def kept(given: Candidates, **settings: object) -> set[str]:
    why = choose(given, SelectionSettings.model_validate(settings))
    return {own for own, said in zip(given.ids, why, strict=True) if said is None}


def cosine(a_E: np.ndarray, b_E: np.ndarray) -> float:
    return float(a_E @ b_E / np.sqrt((a_E @ a_E) * (b_E @ b_E)))


def test_farthest_points_are_those_of_a_plain_loop() -> None:
    z_NE, score_N = RNG.standard_normal((30, 5)), RNG.random(30)
    chosen = [int(score_N.argmax())]
    while len(chosen) < 8:
        left = [n for n in range(30) if n not in chosen]
        chosen.append(min(left, key=lambda n: max(cosine(z_NE[n], z_NE[k]) for k in chosen)))
    assert kept(candidates(z_NE, score_N), count=8, share=1) == {f"p{n:02d}" for n in chosen}


def test_determinantal_choice_is_that_of_determinants() -> None:
    z_NE, score_N = RNG.standard_normal((20, 4)), RNG.random(20)  # more are kept than embeddings are wide
    unit_NE = z_NE / np.linalg.norm(z_NE, axis=1, keepdims=True)
    kernel_NN = np.exp(unit_NE @ unit_NE.T - 1) + JITTER * np.eye(20)
    chosen = [int(score_N.argmax())]
    while len(chosen) < 7:
        left = [n for n in range(20) if n not in chosen]
        chosen.append(max(left, key=lambda n: np.linalg.slogdet(kernel_NN[np.ix_([*chosen, n], [*chosen, n])])[1]))
    assert kept(candidates(z_NE, score_N), count=7, share=1, variety="dpp") == {f"p{n:02d}" for n in chosen}


@pytest.mark.parametrize("variety", ["farthest", "dpp"])
def test_every_candidate_is_told_why(variety: str) -> None:
    z_NE = np.eye(8)
    z_NE[3] = 2 * z_NE[2]  # the same direction, another norm
    score_N = np.array([9, 8, 7, 6, 5, 4, np.nan, 1.0])
    given = candidates(z_NE, score_N, p01="reference/7")
    settings = SelectionSettings.model_validate(
        {"count": 2, "share": 0.75, "min_score": 2, "variety": variety, "near": 0.99}
    )
    why = choose(given, settings)
    assert why == [
        None,
        "copy of reference/7",
        None,
        "too near p02",
        "enough",
        "below score",
        "no score",
        "below score",
    ]
    few = choose(given, settings.model_copy(update={"count": 10}))
    assert few == [None, "copy of reference/7", None, "too near p02", None, None, "no score", "below score"]


@pytest.mark.parametrize("variety", ["farthest", "dpp"])
def test_the_order_of_candidates_decides_nothing(variety: str) -> None:
    z_NE, score_N = RNG.integers(-1, 2, (40, 3)) + 0.5, RNG.integers(0, 3, 40) * 1.0  # full of equals
    given = candidates(z_NE, score_N)
    order = RNG.permutation(40)
    turned = Candidates([given.ids[n] for n in order], z_NE[order], score_N[order], [None] * 40)
    rule = {"count": 9, "variety": variety}
    assert kept(given, **rule) == kept(turned, **rule)


def test_without_scores_all_take_part() -> None:
    assert len(kept(candidates(np.eye(6)), count=6, share=0.1)) == 6
