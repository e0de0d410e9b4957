"""Gaussian statistics against numpy in float64, plain loops and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from index import gaussian

E = 24


def _rows(n: int, seed: int = 0, far: float = 30.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, E)) @ rng.normal(size=(E, E)) + far).astype(np.float32)


def _same(a: gaussian.Moments, b: gaussian.Moments, tolerance: float) -> None:
    for name in ("rows", "weight", "weight_square", "norm", "quartic"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance), name
    for name in ("mean_E", "scatter_EE", "cubic_E"):
        x, y = getattr(a, name), getattr(b, name)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


def test_mean_and_covariance_equal_numpy_in_float64() -> None:
    x_NE = _rows(10_000)
    found = gaussian.moments(x_NE)
    exact_NE = x_NE.astype(np.float64)
    mean_E, covariance_EE = exact_NE.mean(0), np.cov(exact_NE.T)
    assert np.abs(found.mean_E - mean_E).max() / np.abs(mean_E).max() < 1e-13
    assert np.linalg.norm(found.covariance() - covariance_EE) / np.linalg.norm(covariance_EE) < 1e-12
    assert found.mean_norm == pytest.approx(np.linalg.norm(exact_NE, axis=1).mean(), rel=1e-14)


def test_higher_sums_equal_plain_loops() -> None:
    x_NE = _rows(300).astype(np.float64)
    found = gaussian.moments(x_NE)
    mean_E = x_NE.mean(0)
    cubic_E, quartic = np.zeros(E), 0.0
    for x_E in x_NE:
        u_E = x_E - mean_E
        cubic_E += (u_E @ u_E) * u_E
        quartic += (u_E @ u_E) ** 2
    assert np.abs(found.cubic_E - cubic_E).max() < 1e-10 * np.abs(cubic_E).max()
    assert found.quartic == pytest.approx(quartic, rel=1e-12)


def test_shard_order_and_number_change_nothing() -> None:
    x_NE = _rows(6000)
    whole = gaussian.moments(x_NE)
    for count in (2, 7, 60):
        parts = [gaussian.moments(part) for part in np.array_split(x_NE, count)]
        _same(gaussian.merge(parts), whole, 1e-12)
        _same(gaussian.merge(parts[::-1]), whole, 1e-12)


def test_sorted_shards_far_apart_lose_nothing() -> None:
    x_NE = np.concatenate([_rows(1000, far=1000.0), _rows(1000, seed=1, far=-1000.0)])
    parts = [gaussian.moments(part) for part in np.array_split(x_NE, 9)]
    covariance_EE = np.cov(x_NE.astype(np.float64).T)
    found_EE = gaussian.merge(parts).covariance()
    assert np.linalg.norm(found_EE - covariance_EE) / np.linalg.norm(covariance_EE) < 1e-12


def test_a_removed_shard_leaves_what_was_never_there() -> None:
    parts = [_rows(500, seed) for seed in range(4)]
    total = gaussian.merge(gaussian.moments(part) for part in parts)
    left = gaussian.remove(total, gaussian.moments(parts[1]))
    _same(left, gaussian.moments(np.concatenate([parts[0], parts[2], parts[3]])), 1e-10)
    assert gaussian.remove(left, left).rows == 0
    with pytest.raises(ValueError, match="cannot take"):
        gaussian.remove(gaussian.moments(parts[0]), total)


def test_weights_equal_numpy_aweights() -> None:
    x_NE, w_N = _rows(700).astype(np.float64), np.random.default_rng(3).uniform(0, 4, 700)
    found = gaussian.merge([gaussian.moments(x_NE[:300], w_N[:300]), gaussian.moments(x_NE[300:], w_N[300:])])
    covariance_EE = np.cov(x_NE.T, aweights=w_N)
    assert np.allclose(found.mean_E, np.average(x_NE, axis=0, weights=w_N), rtol=1e-13)
    assert np.linalg.norm(found.covariance() - covariance_EE) / np.linalg.norm(covariance_EE) < 1e-12


def test_ledoit_wolf_equals_its_definition_row_by_row() -> None:
    x_NE = _rows(40, far=1.0).astype(np.float64)
    u_NE = x_NE - x_NE.mean(0)
    s_EE = u_NE.T @ u_NE / len(u_NE)
    target_EE = np.trace(s_EE) / E * np.eye(E)
    error = sum(np.linalg.norm(np.outer(u, u) - s_EE) ** 2 for u in u_NE) / len(u_NE) ** 2
    wanted = min(1.0, error / np.linalg.norm(s_EE - target_EE) ** 2)
    parts = [gaussian.moments(part) for part in np.array_split(x_NE, 3)]
    assert 0 < wanted < 1
    assert gaussian.merge(parts).ledoit_wolf() == pytest.approx(wanted, rel=1e-9)


def test_density_distance_and_frechet_equal_scipy() -> None:
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import mahalanobis
    from scipy.stats import multivariate_normal

    a, b = (gaussian.fit(gaussian.moments(_rows(900, seed, far=1.0)), 0.05) for seed in (0, 1))
    z_BE = torch.from_numpy(_rows(5, 9, far=1.0)).double()
    scipy_normal = multivariate_normal(a.mean_E.numpy(), a.covariance_EE.numpy())
    assert np.allclose(a.log_density(z_BE).numpy(), scipy_normal.logpdf(z_BE.numpy()), rtol=1e-10)
    inverse_EE = np.linalg.inv(a.covariance_EE.numpy())
    wanted = [mahalanobis(z, a.mean_E.numpy(), inverse_EE) ** 2 for z in z_BE.numpy()]
    assert np.allclose(a.mahalanobis(z_BE).numpy(), wanted, rtol=1e-9)
    ca, cb = a.covariance_EE.numpy(), b.covariance_EE.numpy()
    distance = ((a.mean_E - b.mean_E) ** 2).sum().item() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert a.frechet(b) == pytest.approx(distance, rel=1e-8)
    assert a.frechet(a) == pytest.approx(0, abs=1e-6)


def test_mahalanobis_lets_gradients_through() -> None:
    normal = gaussian.fit(gaussian.moments(_rows(400, far=0.0)), 0.1)
    z_BE = torch.randn(3, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(normal.mahalanobis, (z_BE,))


def test_samples_follow_the_gaussian_and_the_seed() -> None:
    normal = gaussian.fit(gaussian.moments(_rows(2000, far=2.0)), 0.2)
    drawn_NE = normal.sample(40_000, seed=5)
    assert torch.equal(drawn_NE[:10], normal.sample(40_000, seed=5)[:10])
    assert not torch.equal(drawn_NE[:10], normal.sample(40_000, seed=6)[:10])
    refit = gaussian.fit(gaussian.moments(drawn_NE.numpy()), 0.0)
    assert refit.frechet(normal) < 0.01 * float(normal.covariance_EE.trace())
    assert float(normal.mahalanobis(drawn_NE).mean()) == pytest.approx(E, rel=0.02)


def test_stored_statistics_open_unchanged(tmp_path) -> None:
    statistics = gaussian.moments(_rows(200))
    normal = gaussian.fit(statistics)
    gaussian.save(tmp_path / "gaussian", statistics, normal, {"source": "here"})
    opened, facts = gaussian.load(tmp_path / "gaussian")
    assert facts["source"] == "here"
    assert facts["rows"] == 200
    assert torch.equal(opened.cholesky_EE, normal.cholesky_EE)
    assert opened.shrinkage == normal.shrinkage
    _same(gaussian.load_moments(tmp_path / "gaussian"), statistics, 1e-15)


def test_a_singular_covariance_asks_for_shrinkage() -> None:
    statistics = gaussian.moments(_rows(E // 2))
    with pytest.raises(ValueError, match="shrinkage"):
        gaussian.fit(statistics, 0.0)
    assert gaussian.fit(statistics).rows == E // 2
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        gaussian.fit(statistics, 1.5)


@pytest.mark.parametrize("bad", [np.zeros((3, E + 1)), np.full((3, E), np.nan)])
def test_rows_that_do_not_fit_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"width|finite"):
        gaussian.Accumulator(E).add(bad)


def test_empty_shards_merge_without_trace() -> None:
    part = gaussian.moments(_rows(50))
    for parts in itertools.permutations([part, gaussian.empty(E)]):
        _same(gaussian.merge(parts), part, 1e-15)
    with pytest.raises(ValueError, match="no moments"):
        gaussian.merge([])
