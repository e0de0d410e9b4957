"""New seeds against plain loops in float64, against scipy, and against what their sources promise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from stages.rare.noise import along, combine, log_chi, low_frequencies, norm_aware_centroid, path_cost, slerp


def seeds(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, size), generator=torch.Generator().manual_seed(seed))


def plain_slerp(t: float, a: list[float], b: list[float]) -> list[float]:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    cosine = dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))
    angle = math.acos(cosine)
    return [
        (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle) for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 7, 64])
def test_slerp_against_a_plain_loop(size: int) -> None:
    a_BN, b_BN, t_B = seeds(5, size), seeds(5, size, 1), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    found = slerp(t_B, a_BN, b_BN)
    assert found.dtype == torch.float32
    for row in range(5):
        wanted = plain_slerp(float(t_B[row]), a_BN[row].double().tolist(), b_BN[row].double().tolist())
        np.testing.assert_allclose(found[row], wanted, atol=2e-6)


def test_slerp_keeps_the_norm_divides_the_angle_evenly_and_reaches_both_ends() -> None:
    a_BN, b_BN = (torch.nn.functional.normalize(seeds(1, 9, s).double()) * 3 for s in (0, 1))
    t_B = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = slerp(t_B, a_BN.expand(11, -1), b_BN.expand(11, -1))
    torch.testing.assert_close(found.norm(dim=1), torch.full((11,), 3.0, dtype=torch.float64))
    angles = torch.nn.functional.cosine_similarity(found[1:], found[:-1], dim=1).acos()
    torch.testing.assert_close(angles, angles.mean().expand(10), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0], a_BN[0])
    torch.testing.assert_close(found[-1], b_BN[0])


def test_slerp_of_parallel_seeds_is_their_chord_and_of_opposite_ones_an_error() -> None:
    a_BN = seeds(1, 5)
    torch.testing.assert_close(slerp(torch.tensor([0.25]), a_BN, 2 * a_BN), 1.25 * a_BN)
    with pytest.raises(ValueError, match="opposite"):
        slerp(torch.tensor([0.5]), a_BN, -a_BN)
    with pytest.raises(ValueError, match="zero"):
        slerp(torch.tensor([0.5]), a_BN, 0 * a_BN)


def test_a_combination_against_a_plain_loop() -> None:
    w_BK, z_KN = torch.rand((4, 3), generator=torch.Generator().manual_seed(2)) - 0.3, seeds(3, 11)
    found = combine(w_BK, z_KN)
    for row in range(4):
        weights = w_BK[row].double().tolist()
        length = math.sqrt(sum(w * w for w in weights))
        for n in range(11):
            wanted = sum(w * float(z) for w, z in zip(weights, z_KN[:, n].double(), strict=True)) / length
            assert abs(float(found[row, n]) - wanted) < 1e-6
    with pytest.raises(ValueError, match="weights"):
        combine(torch.zeros(1, 3), z_KN)


def test_combinations_of_gaussian_seeds_are_gaussian_and_plain_means_are_not() -> None:
    z_KN = seeds(6, 40_000)
    w_BK = torch.rand((3, 6), generator=torch.Generator().manual_seed(3))
    for value in combine(w_BK, z_KN).double().numpy():
        assert stats.kstest(value, "norm").pvalue > 0.01
    assert stats.kstest((w_BK / w_BK.sum(1, keepdim=True) @ z_KN)[0].double().numpy(), "norm").pvalue < 1e-6


@pytest.mark.parametrize("size", [2, 768, 16_384])
def test_log_chi_against_scipy(size: int) -> None:
    norms = torch.linspace(0.5, 1.5, 9, dtype=torch.float64) * math.sqrt(size)
    np.testing.assert_allclose(log_chi(norms, size), stats.chi(size).logpdf(norms.numpy()), rtol=1e-9, atol=1e-7)
    peak = norms.new_tensor([math.sqrt(size - 1)]).requires_grad_(True)
    log_chi(peak, size).sum().backward()
    assert peak.grad is not None
    assert abs(float(peak.grad)) < 1e-6  # the mode is at sqrt(N - 1)


def test_the_cost_of_a_path_against_a_plain_loop() -> None:
    path_KPN, cap = seeds(3 * 6, 8).view(3, 6, 8), 3.5
    found = path_cost(path_KPN, cap)
    density = stats.chi(8)
    longer = 0
    for k in range(3):
        cost = 0.0
        for p in range(5):
            left, right = (path_KPN[k, i].double().numpy() for i in (p, p + 1))
            length = float(np.linalg.norm(right - left))
            longer += length > cap
            cost += max(length - cap, 0.0) - length * density.logpdf(np.linalg.norm((left + right) / 2))
        assert float(found[k]) == pytest.approx(cost, rel=1e-5)
    assert 0 < longer < 15  # the penalty is seen at work, and not everywhere


def plain_centroid(z: np.ndarray, points: int, updates: int) -> tuple[np.ndarray, float]:
    """`norm_aware_centroid` without autograd: gradients by hand, Adam by hand, loops over paths and points."""
    count, size = z.shape
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cap = 2 * float(np.mean([np.linalg.norm(z[i] - z[j]) for i, j in pairs])) / points
    mean = z.mean(0)
    centre = mean / np.linalg.norm(mean) * np.mean([np.linalg.norm(one) for one in z])
    places = [p / (points - 1) for p in range(1, points - 1)]
    inner = np.array([[plain_slerp(place, list(centre), list(one)) for place in places] for one in z])
    density = stats.chi(size)
    value = np.concatenate([centre[None], inner.reshape(-1, size)])
    first, second = np.zeros_like(value), np.zeros_like(value)

    def slope(r: float) -> float:
        return (size - 1) / r - r

    for update in range(updates + 1):
        gradient = np.zeros_like(value)
        r = np.linalg.norm(value[0])
        cost = -density.logpdf(r)
        gradient[0] -= slope(r) * value[0] / r
        for k in range(count):
            rows = [0, *range(1 + k * (points - 2), 1 + (k + 1) * (points - 2)), None]
            for left, right in pairwise(rows):
                a, b = value[left], z[k] if right is None else value[right]
                step, middle = b - a, (a + b) / 2
                length, r = np.linalg.norm(step), np.linalg.norm(middle)
                cost += max(length - cap, 0.0) - length * density.logpdf(r)
                along_step = (float(length > cap) - density.logpdf(r)) * step / length
                outward = -length * slope(r) * middle / r / 2
                gradient[left] += outward - along_step
                if right is not None:
                    gradient[right] += outward + along_step
        if update == updates:
            return value[0], cost
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9 ** (update + 1)), second / (1 - 0.999 ** (update + 1))
        value = value - 0.01 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    raise AssertionError


@pytest.mark.parametrize("count", [2, 3])
def test_the_centroid_against_gradients_and_adam_by_hand(count: int) -> None:
    z_KN = 1.2 * seeds(count, 12)
    found = norm_aware_centroid(z_KN.double(), points=6, limit=15, tolerance=0)
    centre, cost = plain_centroid(z_KN.double().numpy(), 6, 15)
    assert found.updates == 15
    np.testing.assert_allclose(found.centroid_N, centre, atol=1e-7)
    assert found.cost == pytest.approx(cost, rel=1e-8)
    single = norm_aware_centroid(z_KN, points=6, limit=15, tolerance=0)
    np.testing.assert_allclose(single.centroid_N, centre, atol=1e-3)


def test_norm_aware_paths_run_in_the_shell_where_arcs_between_short_seeds_do_not() -> None:
    z_KN = 0.6 * seeds(3, 768)  # as DDIM inversion leaves them
    found = norm_aware_centroid(z_KN, points=20, limit=400)
    assert found.cost < 0.3 * found.start_cost
    # The last points swing about the shell, so that the middles between them lie on it: the objective sees these alone.
    norms = found.path_KPN[:, :-8].norm(dim=2) / math.sqrt(768)
    assert bool(((norms > 0.97) & (norms < 1.03)).all())
    middles = ((found.path_KPN[:, 1:] + found.path_KPN[:, :-1]) / 2)[:, :-4].norm(dim=2) / math.sqrt(768)
    assert bool(((middles > 0.95) & (middles < 1.05)).all())
    assert float(found.centroid_N.norm()) / math.sqrt(768) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found.path_KPN[:, -1], z_KN)
    torch.testing.assert_close(found.path_KPN[:, 0], found.centroid_N.expand(3, -1))
    cosine = torch.nn.functional.cosine_similarity(found.centroid_N[None], z_KN)
    assert float(cosine.min()) > 0.4  # in the middle: 1 / sqrt(3) for seeds at right angles


def test_a_centroid_ends_by_itself_when_nothing_changes() -> None:
    found = norm_aware_centroid(seeds(2, 64), points=5, tolerance=1e9, patience=3)
    assert found.updates == 3
    with pytest.raises(ValueError, match="at least 2"):
        norm_aware_centroid(seeds(1, 8))
    with pytest.raises(ValueError, match="points is 2"):
        norm_aware_centroid(seeds(2, 8), points=2)
    with pytest.raises(ValueError, match="mean of the seeds is zero"):
        norm_aware_centroid(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


def test_points_along_paths() -> None:
    path_KPN = seeds(2 * 4, 3).view(2, 4, 3)
    found = along(path_KPN, torch.tensor([0, 1, 1, 0]), torch.tensor([0.0, 1.0, 0.5, 1 / 3]))
    wanted = [path_KPN[0, 0], path_KPN[1, 3], (path_KPN[1, 1] + path_KPN[1, 2]) / 2, path_KPN[0, 1]]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize(("low", "shape"), [(0.25, (4, 16, 16)), (0.5, (3, 8, 12)), (0.25, (2, 9, 7))])
def test_a_blend_has_the_low_frequencies_of_the_one_and_the_others_of_the_other(low: float, shape) -> None:
    """By numpy's full transform, wave by wave."""
    generator = torch.Generator().manual_seed(0)
    z, fresh = 1.3 * torch.randn((5, *shape), generator=generator), torch.randn((5, *shape), generator=generator)
    made, own, other = (np.fft.fft2(x.double().numpy()) for x in (low_frequencies(z, fresh, low), z, fresh))
    waves, scale = 0, made[:, 0, 0, 0] / own[:, 0, 0, 0]
    for y, v in enumerate(np.fft.fftfreq(shape[1])):
        for x, u in enumerate(np.fft.fftfreq(shape[2])):
            if max(abs(v), abs(u)) <= low * 0.5:
                waves += 1
                ratio = made[..., y, x] / own[..., y, x]
                np.testing.assert_allclose(ratio, scale[:, None] * np.ones(shape[0]), rtol=1e-4)
            else:
                np.testing.assert_allclose(made[..., y, x], other[..., y, x], atol=1e-4)
    kept = low_frequencies(z, torch.zeros_like(z), low).double()
    np.testing.assert_allclose(kept.square().sum((1, 2, 3)), shape[0] * waves, rtol=1e-5)


def test_the_variance_of_a_blend_stays_one_whatever_the_seeds_were() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (0.5, 1.0, 1.5):
        z = size * torch.randn((400, 4, 8, 8), generator=generator)
        made = low_frequencies(z, torch.randn(z.shape, generator=generator), 0.5)
        assert float(made.mean()) == pytest.approx(0, abs=0.02)
        assert float(made.var()) == pytest.approx(1, abs=0.02)
        assert float(made.var(0).max()) < 1.4
