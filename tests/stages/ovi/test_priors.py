"""Priors without training, against numpy, scipy and scikit-learn."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_approximation import Nystroem as Approximation
from sklearn.linear_model import Ridge

from index import fits, joint
from index.reference import Reference
from jobs.schema.reading import load
from stages.models import clip
from stages.ovi import kernel, priors
from stages.ovi.methods import build
from stages.ovi.settings import InvertPromptsSettings, Kernel, Linear, MeanShift, Procrustes, Retrieval
from stages.ovi.stage import InvertPrompts
from tests.support.captioned import build_captioned
from tests.support.cards import card
from tests.support.prompt_methods import run
from tests.support.tiny_kandinsky import build_prior

TEXTS = 120


@pytest.fixture(scope="module")
def output(prior, tmp_path_factory):
    return build_captioned(tmp_path_factory.mktemp("captioned"), prior, TEXTS)


@pytest.fixture(scope="module")
def captioned(context, output):
    return replace(context, reference=Reference.open(output))


@pytest.fixture(scope="module")
def pairs(captioned):
    """Text and image embeddings of the captioned rows, float64."""
    captions = captioned.reference.captions
    images = captioned.reference.index.vectors_NE[captions.rows_M]
    return captions.index.vectors_NE.astype(np.float64), images.astype(np.float64)


@pytest.fixture(autouse=True)
def _temporary_files(tmp_path, monkeypatch):
    """Fits are kept among them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _embeddings(method, context, rows):
    found = run(method, context, rows)
    return np.stack([found[row["id"]]["embedding"] for row in rows]).astype(np.float64)


def _texts(rows):
    return np.stack([row["text"] for row in rows]).astype(np.float64)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_mean_shift_moves_by_the_difference_of_the_means(captioned, rows, pairs):
    t, z = pairs
    wanted = _texts(rows) + z.mean(0) - t.mean(0)
    np.testing.assert_allclose(_embeddings(MeanShift(), captioned, rows), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-2, 0.3])
def test_linear_is_scikit_learns_ridge(captioned, rows, pairs, ridge):
    t, z = pairs
    alpha = (TEXTS - 1) * ridge * np.trace(np.cov(t.T)) / t.shape[1]
    wanted = Ridge(alpha=alpha).fit(t, z).predict(_texts(rows))
    found = _embeddings(Linear(ridge=ridge), captioned, rows)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_kernel_is_scikit_learns_ridge_on_its_nystroem_features(captioned, rows, pairs):
    t, z = pairs
    u = _unit(t)
    sharpness, ridge, count = 0.9, 0.05, 40
    a = sharpness / (1 - np.square(u.mean(0)).sum())
    chosen = np.sort(np.random.default_rng(kernel.SEED).permutation(TEXTS)[:count])
    model = Approximation(kernel=lambda x, y: np.exp(a * (x @ y - 1)), n_components=count)
    model.fit(u[chosen])
    features, new = model.transform(u), model.transform(_unit(_texts(rows)))
    alpha = (TEXTS - 1) * ridge * np.trace(np.cov(features.T)) / features.shape[1]
    wanted = Ridge(alpha=alpha).fit(features, z).predict(new)
    found = _embeddings(Kernel(sharpness=sharpness, ridge=ridge, centres=count), captioned, rows)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_kernel_with_every_caption_a_centre_is_a_gaussian_process(captioned, rows, pairs):
    """Of the kernel and the targets without their means, as ridge regression with an intercept is."""
    t, z = pairs
    u, new = _unit(t), _unit(_texts(rows))
    a = 0.7 / (1 - np.square(u.mean(0)).sum())
    made = kernel.fit(captioned.reference, captioned.reference.captions, Kernel(ridge=0.2, sharpness=0.7))
    conditional = priors.Conditional(*made)
    features = conditional.features(torch.from_numpy(t)).numpy()
    noise = (TEXTS - 1) * 0.2 * np.trace(np.cov(features.T)) / features.shape[1]
    rbf = RBF(1 / np.sqrt(a), "fixed")  # exp(a (cos - 1)) of unit vectors
    gram, across = rbf(u), rbf(new, u)
    assert np.abs(features @ features.T - gram).max() < 1e-6
    centred_across = across - across.mean(1, keepdims=True) - gram.mean(0) + gram.mean()
    centred_gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    wanted = z.mean(0) + centred_across @ np.linalg.solve(centred_gram + noise * np.eye(TEXTS), z - z.mean(0))
    found = conditional.mean(torch.from_numpy(_texts(rows))).numpy()
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
    plain = GaussianProcessRegressor(rbf, alpha=noise, optimizer=None).fit(u, z - z.mean(0))
    alone = across @ np.linalg.solve(gram + noise * np.eye(TEXTS), z - z.mean(0))
    np.testing.assert_allclose(plain.predict(new), alone, rtol=1e-6, atol=1e-9)  # that this is the same kernel


def test_a_kernel_is_fitted_once_on_a_machine(captioned, rows, tmp_path, monkeypatch):
    made, fit = [], kernel.fit

    def counted(reference, captions, method):
        made.append(method)
        return fit(reference, captions, method)

    monkeypatch.setattr(kernel, "fit", counted)
    method = Kernel(centres=40, residual=0.5)
    first, second = (_embeddings(method, captioned, rows) for _ in range(2))  # two workers' stages
    assert len(made) == 1
    np.testing.assert_array_equal(first, second)
    features, regression = fit(captioned.reference, captioned.reference.captions, method)
    held, kept = kernel.kept(captioned.reference, captioned.reference.captions, method)
    assert (held.a, kept.ridge) == (features.a, regression.ridge)
    for name in ("centres_CT", "root_CF"):
        assert torch.equal(getattr(held, name), getattr(features, name))
    for name in ("mean_text_T", "mean_image_E", "weights_ET", "left_EE"):
        assert torch.equal(getattr(kept, name), getattr(regression, name))

    (file,) = tmp_path.rglob(fits.FILE)
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\1" * 8)
    np.testing.assert_array_equal(_embeddings(method, captioned, rows), first)
    assert file.read_bytes() == whole
    assert len(made) == 2
    _embeddings(Kernel(centres=41), captioned, rows)
    assert len(made) == 3


@pytest.mark.card
def test_what_is_fitted_works_where_the_job_does(captioned, rows, monkeypatch):
    """On a card that refuses what was not brought along; its arithmetic is the CPU's."""
    seen, plain = set(), joint.Regression.__call__

    def watched(self, t_BT):
        seen.add(t_BT.device.type)
        return plain(self, t_BT)

    monkeypatch.setattr(joint.Regression, "__call__", watched)
    away = replace(captioned, device=card())
    for method in (
        Linear(), Linear(sample=True), Linear(residual=0.5), Kernel(centres=40), Kernel(centres=40, sample=True),
    ):  # fmt: skip
        wanted = _embeddings(method, captioned, rows)
        assert seen == {"cpu"}
        seen.clear()
        np.testing.assert_allclose(_embeddings(method, away, rows), wanted, rtol=1e-5, atol=1e-5)
        assert seen == {"card"}
        seen.clear()


def test_a_fit_is_of_the_captions_that_are_there(captioned, prior, rows, tmp_path):
    """A reference that was made again under the same path is another one."""
    from shutil import copytree, rmtree

    folder, found = tmp_path / "reference", []
    for seed in (0, 1):
        rmtree(folder, ignore_errors=True)
        copytree(build_captioned(tmp_path / f"made-{seed}", prior, TEXTS, seed=seed), folder)
        found.append(_embeddings(Kernel(), replace(captioned, reference=Reference.open(folder)), rows))
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_samples_have_the_conditional_gaussian_and_are_the_rows_own(captioned, rows):
    many = [{**rows[0], "id": f"p{n}"} for n in range(4000)]
    found = _embeddings(Linear(sample=True), captioned, many)
    conditional = priors.linear(Linear(), captioned)
    mean = conditional.mean(torch.from_numpy(_texts(rows[:1]))).numpy()[0]
    left = conditional.regression.left_EE.numpy()
    np.testing.assert_allclose(found.mean(0), mean, atol=4 * np.sqrt(left.diagonal().max() / 4000))
    assert np.linalg.norm(np.cov(found.T) - left) < 0.1 * np.linalg.norm(left)
    alone = _embeddings(Linear(sample=True), captioned, many[17:18])
    np.testing.assert_allclose(alone[0], found[17], rtol=1e-6)
    other = _embeddings(Linear(sample=True), replace(captioned, seed=4), many[17:18])
    assert np.abs(other[0] - found[17]).max() > 1e-2


def test_a_residual_is_a_near_pictures_own_and_its_caption_gives_the_picture(captioned, rows, pairs):
    t, z = pairs
    mean = priors.linear(Linear(), captioned).mean
    order = np.argsort(-(_unit(_texts(rows)) @ _unit(t).T), axis=1)
    near = order[:, 0]
    wanted = mean(torch.from_numpy(_texts(rows))).numpy() + 0.4 * (z[near] - mean(torch.from_numpy(t[near])).numpy())
    np.testing.assert_allclose(_embeddings(Linear(residual=0.4), captioned, rows), wanted, rtol=1e-5, atol=1e-5)
    own = [{"id": f"p{n}", "prompt": "", "text": t[n].astype(np.float32)} for n in range(20)]
    for method in (Linear(residual=1.0), Kernel(residual=1.0)):
        np.testing.assert_allclose(_embeddings(method, captioned, own), z[:20], atol=1e-4)
    many = [{**rows[0], "id": f"p{n}"} for n in range(60)]
    drawn = _embeddings(Linear(residual=1.0, sample=True, k=5), captioned, many)
    lefts = (
        z[order[0, :5]]
        - mean(torch.from_numpy(t[order[0, :5]])).numpy()
        + mean(torch.from_numpy(_texts(rows)[:1])).numpy()
    )
    apart = np.abs(drawn[:, None] - lefts).max(-1)
    assert apart.min(1).max() < 1e-4
    assert set(apart.argmin(1)) == set(range(5))  # each of the five was drawn
    alone = _embeddings(Linear(residual=1.0, sample=True, k=5), captioned, many[7:8])
    np.testing.assert_allclose(alone[0], drawn[7], rtol=1e-6)


def test_retrieval_by_caption_is_the_mean_of_the_pictures_with_the_nearest_captions(captioned, rows, pairs):
    t, z = pairs
    order = np.argsort(-(_unit(_texts(rows)) @ _unit(t).T), axis=1)
    for k in (1, 5):
        found = _embeddings(Retrieval(k=k, nearest_by="caption"), captioned, rows)
        np.testing.assert_allclose(found, z[order[:, :k]].mean(1), atol=1e-5)
    with pytest.raises(ValueError, match=r"k is 121, the reference .* has 120 rows with cap"):
        build(Retrieval(k=121, nearest_by="caption"), captioned)


def test_procrustes_is_scipys_where_the_captions_span_the_space(captioned, rows, pairs):
    t, z = pairs
    k = 40
    found = _embeddings(Procrustes(k=k), captioned, rows)
    order = np.argsort(-(_unit(_texts(rows)) @ _unit(t).T), axis=1)[:, :k]
    for own, near, z_E in zip(_unit(_texts(rows)), order, found, strict=True):
        turn, _ = orthogonal_procrustes(_unit(t[near]), _unit(z[near]))
        wanted = own @ turn * np.linalg.norm(z[near], axis=1).mean()
        assert np.abs(z_E - wanted).max() < 1e-5 * np.abs(wanted).max()
    few = _embeddings(Procrustes(k=3), captioned, rows)  # fewer than the width: in the span of their pictures
    for near, z_E in zip(order, few, strict=True):
        weights = np.linalg.lstsq(z[near[:3]].T, z_E, rcond=None)[0]
        np.testing.assert_allclose(weights @ z[near[:3]], z_E, atol=1e-4)


def test_a_reference_that_does_not_serve_says_what_to_do(context, captioned, prior, output, tmp_path):
    for method in (MeanShift(), Linear(), Kernel(), Procrustes(), Retrieval(nearest_by="caption")):
        with pytest.raises(ValueError, match=r"needs captions, and the reference .* has none: make one with `cap"):
            build(method, context)
    few = replace(context, reference=Reference.open(build_captioned(tmp_path / "few", prior, 20)))
    with pytest.raises(
        ValueError, match="method 'linear': 20 captioned rows are too few for a ridge of 1e-05: it takes"
    ):
        build(Linear(ridge=1e-5), few)
    assert len(run(Linear(), few, [{"id": "a", "prompt": "x", "text": np.ones(24, np.float32)}])) == 1
    other = build_prior(tmp_path / "other", seed=7)
    facts = json.loads((Path(output) / "reference/reference.json").read_text())
    strange = Path(build_captioned(tmp_path / "strange", prior, 20))
    told = {**facts, "text_encoder": clip.identity(other, "text")}
    (strange / "reference/reference.json").write_text(json.dumps(told))
    settings = InvertPromptsSettings(encoder=prior, methods=(Linear(),), reference=str(strange))
    with pytest.raises(ValueError, match=r"were embedded by .*other, the prompts are by .*: make the reference with"):
        InvertPrompts.describe(settings)


def test_a_job_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="'linear' needs `reference:`"):
        load({"job": "invert-prompts", "input": "x.txt", "methods": ["linear"]})
