"""Joint statistics of texts and images against numpy in float64, plain loops and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from index import joint

T, E = 12, 20


def _rows(n: int, seed: int = 0, far: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Texts and images that have something to do with each other, far from zero, float32 as they are stored."""
    rng = np.random.default_rng(seed)
    hidden, mixing = rng.normal(size=(n, 8)), np.random.default_rng(99)
    t_NT = hidden @ mixing.normal(size=(8, T)) + 0.3 * rng.normal(size=(n, T)) + far
    z_NE = hidden @ mixing.normal(size=(8, E)) + 0.5 * rng.normal(size=(n, E)) - far
    return t_NT.astype(np.float32), z_NE.astype(np.float32)


def _pairs(t_NT: np.ndarray, z_NE: np.ndarray) -> joint.Pairs:
    sums = joint.Accumulator(t_NT.shape[1], z_NE.shape[1])
    for part in np.array_split(np.arange(len(t_NT)), 3):
        sums.add(t_NT[part], z_NE[part])
    return sums.pairs()


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_shards_in_any_order_equal_numpy() -> None:
    t_NT, z_NE = _rows(3000)
    exact_JJ = np.cov(np.concatenate([t_NT, z_NE], 1).astype(np.float64).T)
    exact_J = np.concatenate([t_NT.astype(np.float64).mean(0), z_NE.astype(np.float64).mean(0)])
    shards = [_pairs(t_NT[part], z_NE[part]) for part in np.array_split(np.arange(3000), 4)]
    for order in itertools.permutations(shards):
        total = joint.merge(order)
        assert total.rows == 3000
        assert _relative(np.concatenate([total.mean_text_T, total.mean_image_E]), exact_J) < 1e-12
        assert _relative(total.moments.covariance(), exact_JJ) < 1e-12


def test_a_removed_shard_leaves_what_was_never_there() -> None:
    parts = [_pairs(*_rows(400, seed)) for seed in range(3)]
    left, wanted = joint.remove(joint.merge(parts), parts[1]), joint.merge([parts[0], parts[2]])
    assert left.rows == wanted.rows == 800
    assert _relative(left.moments.covariance(), wanted.moments.covariance()) < 1e-11
    assert _relative(left.unit_J, wanted.unit_J) < 1e-12
    again = joint.Pairs.from_arrays(wanted.to_arrays())
    assert (again.texts, again.images, again.cosine) == (T, E, wanted.cosine)
    assert np.array_equal(np.tril(again.moments.scatter_EE), np.tril(wanted.moments.scatter_EE))
    with pytest.raises(ValueError, match="other widths"):
        joint.merge([wanted, joint.Accumulator(T - 1, E + 1).pairs()])


def test_the_modality_gap_equals_a_plain_loop() -> None:
    t_NT, z_NE = _rows(200)
    assert _pairs(t_NT, z_NE).gap is None  # of two widths
    z_NT = z_NE[:, :T]
    units = [[x / np.sqrt(sum(float(v) ** 2 for v in x)) for x in rows.astype(np.float64)] for rows in (t_NT, z_NT)]
    gap = np.linalg.norm(sum(units[0]) / 200 - sum(units[1]) / 200)
    cosine = np.mean([a @ b for a, b in zip(*units, strict=True)])
    found = _pairs(t_NT, z_NT)
    assert found.gap == pytest.approx(gap, rel=1e-12)
    assert found.matched_cosine == pytest.approx(cosine, rel=1e-12)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_the_conditional_mean_is_scikit_learns_ridge(ridge: float) -> None:
    t_NT, z_NE = (x.astype(np.float64) for x in _rows(300))
    found = joint.Fit.of(_pairs(t_NT, z_NE)).under(ridge)
    variance = np.trace(np.cov(t_NT.T)) / T
    model = Ridge(alpha=299 * ridge * variance).fit(t_NT, z_NE)
    new_BT = _rows(50, seed=5)[0].astype(np.float64)
    assert _relative(found(torch.from_numpy(new_BT)).numpy(), model.predict(new_BT)) < 1e-9
    left_NE = z_NE - model.predict(t_NT)
    gram_TT = (t_NT - t_NT.mean(0)).T @ (t_NT - t_NT.mean(0))
    freedom = np.trace(gram_TT @ np.linalg.inv(gram_TT + 299 * ridge * variance * np.eye(T)))
    wanted_EE = left_NE.T @ left_NE / (299 - freedom)
    assert _relative(found.left_EE.numpy(), wanted_EE) < 1e-9
    assert _relative((found.root_EE @ found.root_EE.mT).numpy(), wanted_EE) < 1e-9


def test_without_a_ridge_it_is_the_conditional_gaussian() -> None:
    pairs = _pairs(*_rows(5000))
    found = joint.Fit.of(pairs).under(1e-12)
    covariance_JJ = pairs.moments.covariance()
    tt, zt, zz = covariance_JJ[:T, :T], covariance_JJ[T:, :T], covariance_JJ[T:, T:]
    weights_ET = np.linalg.solve(tt, zt.T).T
    assert _relative(found.weights_ET.numpy(), weights_ET) < 1e-9
    assert _relative(found.left_EE.numpy(), (zz - weights_ET @ zt.T) * 4999 / (4999 - T)) < 1e-8


def test_the_chosen_ridge_is_the_one_of_least_error_left_out() -> None:
    """Generalised cross-validation against its definition; and it is near what is best on new rows."""
    t_NT, z_NE = (x.astype(np.float64) for x in _rows(60))
    fit = joint.Fit.of(_pairs(t_NT, z_NE))
    variance, centred_NT = np.trace(np.cov(t_NT.T)) / T, t_NT - t_NT.mean(0)
    new_t, new_z = (x.astype(np.float64) for x in _rows(4000, seed=8))
    scores, errors = [], []
    for ridge in joint.RIDGES:
        hat_NN = centred_NT @ np.linalg.solve(
            centred_NT.T @ centred_NT + 59 * ridge * variance * np.eye(T), centred_NT.T
        )  # fmt: skip
        left_NE = z_NE - z_NE.mean(0) - hat_NN @ (z_NE - z_NE.mean(0))
        scores.append(np.square(left_NE).sum() / (1 - (1 + np.trace(hat_NN)) / 60) ** 2)
        errors.append(np.square(fit.under(float(ridge))(torch.from_numpy(new_t)).numpy() - new_z).sum())
    assert fit.ridge == joint.RIDGES[int(np.argmin(scores))]
    assert errors[int(np.argmin(scores))] < 1.02 * min(errors)


def test_too_few_captioned_rows_are_told_how_many_it_takes() -> None:
    t_NT, z_NE = _rows(15)
    fit = joint.Fit.of(_pairs(t_NT, z_NE))
    with pytest.raises(joint.TooFewRows, match=r"15 captioned rows are too few for a ridge of 1e-06: it takes 2\d"):
        fit.under(1e-6)
    assert 2 * fit.freedom(fit.ridge) <= 14
    with pytest.raises(joint.TooFewRows, match="there are 9 captioned rows, at least 10 are needed"):
        joint.Fit.of(_pairs(t_NT[:9], z_NE[:9]))


def test_bad_pairs_are_refused() -> None:
    t_NT, z_NE = _rows(5)
    with pytest.raises(ValueError, match="are no pairs"):
        joint.Accumulator(T, E).add(t_NT, z_NE[:4])
    z_NE[2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        joint.Accumulator(T, E).add(t_NT, z_NE)
    assert joint.Accumulator(T, E).pairs().rows == 0
