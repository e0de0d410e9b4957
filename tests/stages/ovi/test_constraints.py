"""What captions and statistics make of the constraints, against closed forms."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.kernel_approximation import Nystroem

from index import gaussian
from index.reference import Reference
from stages.ovi import kernel
from stages.ovi.constraints import Whitening, floored
from stages.ovi.methods import build, whitening_of
from stages.ovi.problem import OviProblem, Parametrization
from stages.ovi.settings import OVI, Constraint, Direct, Kernel, Stop
from tests.support.captioned import build_captioned
from tests.support.prompt_methods import run

LONG = {"steps": 3000, "lr": 2e-2, "stop": Stop(watch="loss", relative=1e-9, patience=50)}


@pytest.fixture(scope="module")
def captioned(context, prior, tmp_path_factory):
    return replace(context, reference=Reference.open(build_captioned(tmp_path_factory.mktemp("made"), prior, 150)))


def _anisotropic(width: int, rows: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of embeddings as CLIP has them: a far mean, variances over five decades; of `rows` rows."""
    rng = np.random.default_rng(width)
    axes, _ = np.linalg.qr(rng.normal(size=(width, width)))
    deviations = np.sqrt(np.logspace(0, -5, width) * 100 / width)
    z = (rng.normal(size=(rows, width)) * deviations) @ axes.T + rng.normal(size=width) * 5 / np.sqrt(width)
    return z.mean(0), np.cov(z.T)


@pytest.mark.parametrize("width", [128, 768, 1280])
def test_a_balanced_weight_means_the_same_at_every_width(width):
    """One job for all: a row ends about as far from the mean as an image, or at 1 / w^2 of that."""
    mean, covariance = _anisotropic(width)
    cholesky = torch.from_numpy(np.linalg.cholesky(covariance + 1e-9 * np.eye(width)))
    whitening = Whitening.of(torch.from_numpy(mean), cholesky)
    texts = np.random.default_rng(1).normal(size=(4, width))
    given = [{"id": f"p{i}", "text": t.astype(np.float32)} for i, t in enumerate(texts)]
    ends = {}
    for weight in (1.0, 4.0):
        method = Direct(constraint=Constraint(mahalanobis=weight, units="balanced"), slots=4, steps=400)
        problem = OviProblem(Parametrization.direct(whitening), method, whitening=whitening)
        problem.load(list(range(4)), given)
        while problem.active_B.any():
            problem.step()
        ends[weight] = [row["mahalanobis"] for row in problem.unload(list(range(4)))]
    assert 0.2 < min(ends[1.0]) <= max(ends[1.0]) < 1.5
    assert 0.5 / 16 < min(ends[4.0]) <= max(ends[4.0]) < 2 / 16  # images are longer than their mean: not exactly


def test_the_balance_is_the_gradients_ratio():
    mean, covariance = _anisotropic(24)
    whitening = Whitening.of(torch.from_numpy(mean), torch.from_numpy(np.linalg.cholesky(covariance)))
    t_BE = torch.nn.functional.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    centre_BE = whitening.centres(t_BE)
    norm = float((np.square(mean).sum() + np.trace(covariance)) ** 0.5)
    z_BE = (centre_BE / centre_BE.norm(dim=-1, keepdim=True) * norm).requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(z_BE, t_BE, dim=-1)
    (pull_BE,) = torch.autograd.grad(cosine.sum(), z_BE)
    wanted = (pull_BE @ whitening.cholesky_EE).norm(dim=-1) * 24**0.5 / 2
    assert torch.allclose(whitening.balance(t_BE, centre_BE), wanted, rtol=1e-4)


def test_a_floor_lifts_the_thin_axes_alone():
    _, covariance = _anisotropic(24)
    factor = floored(torch.from_numpy(covariance), 0.05)
    was, now = np.linalg.eigvalsh(covariance), np.linalg.eigvalsh((factor @ factor.mT).numpy())
    np.testing.assert_allclose(now, np.maximum(was, 0.05 * was.mean()), rtol=1e-9)


def _features(around, captions):
    """What the mean is linear in, how many of it there are, and the ridge that is chosen."""
    t = captions.index.vectors_NE.astype(np.float64)
    if around == "prompt":
        return (lambda x: x), t.shape[1], captions.fit.ridge
    u = t / np.linalg.norm(t, axis=1, keepdims=True)
    a = Kernel().sharpness / (1 - np.square(u.mean(0)).sum())
    features = Nystroem(kernel=lambda x, y: np.exp(a * (x @ y - 1)), n_components=len(u)).fit(u)
    values = np.linalg.eigvalsh(np.exp(a * (u @ u.T - 1)))
    return (
        lambda x: features.transform(x / np.linalg.norm(x, axis=1, keepdims=True)),
        int((values > kernel.NEGLIGIBLE * values[-1]).sum()),
        None,
    )


@pytest.mark.parametrize("around", ["prompt", "kernel"])
def test_around_the_prompt_the_minimum_solves_its_own_equation(captioned, rows, around, tmp_path, monkeypatch):
    """Gradient of 1 - cos plus the weighted distance to the prompt's own Gaussian, by numpy, is zero at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where fits are kept
    constraint = Constraint(mahalanobis=0.5, around=around, floor=0.01)
    found = run(Direct(constraint=constraint, **LONG), captioned, rows)
    captions, images = captioned.reference.captions, captioned.reference.index.vectors_NE
    features, count, chosen = _features(around, captions)
    if chosen is None:
        chosen = kernel.kept(captioned.reference, captions, Kernel())[1].ridge
    t = features(captions.index.vectors_NE.astype(np.float64))
    z = images[captions.rows_M].astype(np.float64)
    covariance = np.cov(t.T)
    ridge = chosen * np.trace(covariance) / count
    centred = t - t.mean(0)
    weights = np.linalg.solve(covariance + ridge * np.eye(t.shape[1]), centred.T @ (z - z.mean(0)) / 149)
    spectrum = np.linalg.eigvalsh(covariance)
    freedom = (spectrum / (spectrum + ridge)).sum()
    left = np.cov((z - z.mean(0) - centred @ weights).T) * 149 / (149 - freedom)
    values, axes = np.linalg.eigh(left)
    precision = (axes / np.maximum(values, 0.01 * values.mean())) @ axes.T
    for row in rows:
        own = row["text"].astype(np.float64)
        centre = z.mean(0) + (features(own[None])[0] - t.mean(0)) @ weights
        z_E = found[row["id"]]["embedding"].astype(np.float64)
        u, s = own / np.linalg.norm(own), z_E / np.linalg.norm(z_E)
        pull = (u - (u @ s) * s) / np.linalg.norm(z_E)
        hold = 2 * 0.5 / 24 * precision @ (z_E - centre)
        assert np.linalg.norm(pull - hold) < 0.02 * np.linalg.norm(pull)


def test_neighbours_by_caption_are_the_pictures_with_the_nearest_captions(captioned, rows):
    captions = captioned.reference.captions
    t, z = captions.index.vectors_NE, captioned.reference.index.vectors_NE[captions.rows_M]
    u = t / np.linalg.norm(t, axis=1, keepdims=True)
    method = Direct(constraint=Constraint(mahalanobis=0.1, neighbours=2.0, k=3, nearest_by="caption"))
    found = run(method, captioned, rows)
    for row in rows:
        near = z[np.argsort(-(u @ row["text"]))[:3]]
        z_E = found[row["id"]]["embedding"]
        cosine = (near @ z_E / np.linalg.norm(near, axis=1) / np.linalg.norm(z_E)).mean()
        assert found[row["id"]]["neighbour_cosine"] == pytest.approx(cosine, abs=1e-5)
    ovi = run(OVI(constraint=method.constraint, steps=5, stop=Stop()), captioned, rows)
    assert {row["status"] for row in ovi.values()} == {"ok"}


def test_without_the_options_nothing_is_asked_of_captions(context, captioned, rows):
    plain = Direct()
    whitening = whitening_of(plain, context)
    statistics = gaussian.moments(np.array(context.reference.index.vectors_NE))
    assert torch.equal(whitening.cholesky_EE, gaussian.fit(statistics).cholesky_EE.float())
    assert "units" not in plain.model_dump(mode="json")["constraint"]
    for around in ("prompt", "kernel"):
        with pytest.raises(ValueError, match="needs captions"):
            build(Direct(constraint=Constraint(mahalanobis=1, around=around)), context)
    for given, said in (
        ({"around": "prompt"}, "belongs to `mahalanobis`"),
        ({"nearest_by": "caption"}, "belongs to `neighbours`"),
        ({"nearest_by": "caption", "neighbours": 1, "interval": 3}, "no `interval`"),
    ):
        with pytest.raises(ValueError, match=said):
            Constraint(**given)
