"""The random numbers of a learning step."""

from __future__ import annotations

import math

import torch
from scipy.stats import chisquare

from stages.concepts.draws import draw, skewed
from stages.concepts.settings import LegoSettings


def test_draws_are_balanced_replayable_and_skewed_as_asked():
    settings = LegoSettings(pictures=4)
    shown = torch.tensor([True, True, True, False, False])
    seen = torch.cat([draw(settings, 0, "x", s, shown, (1, 1, 1), 1000).picture_K for s in range(300)])
    assert (seen.view(-1, 4)[:, :2] < 3).all()
    assert (seen.view(-1, 4)[:, 2:] >= 3).all()
    assert torch.bincount(seen).tolist()[3:] == [300, 300]  # two of two in each step
    again = draw(settings, 0, "x", 5, shown, (1, 1, 1), 1000)
    assert torch.equal(again.noise_KCHW, draw(settings, 0, "x", 5, shown, (1, 1, 1), 1000).noise_KCHW)
    assert not torch.equal(again.noise_KCHW, draw(settings, 0, "y", 5, shown, (1, 1, 1), 1000).noise_KCHW)
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    x = skewed(u, 0.5)
    assert torch.allclose(
        x - 0.5 * torch.sin(math.pi * x) / math.pi, u, atol=1e-9
    )  # the inverse of the distribution function


def test_templates_flips_and_samples_are_drawn_by_row_and_step_and_leave_the_rest_alone():
    shown = torch.tensor([True, True, False, False])
    script = LegoSettings(pictures=4, templates="object", flip=True, posterior="sample")

    def drawn(settings, step, row="x"):
        return draw(settings, 0, row, step, shown, (2, 3, 3), 1000)

    plain, found = drawn(LegoSettings(pictures=4), 5), drawn(script, 5)
    assert torch.equal(found.picture_K, plain.picture_K)
    assert torch.equal(found.t_K, plain.t_K)
    assert torch.equal(found.noise_KCHW, plain.noise_KCHW)
    assert plain.template_K.tolist() == plain.flip_K.tolist() == [0] * 4
    assert plain.posterior_KCHW is None
    again = drawn(script, 5)
    assert torch.equal(again.template_K, found.template_K)
    assert torch.equal(again.flip_K, found.flip_K)
    assert torch.equal(again.posterior_KCHW, found.posterior_KCHW)
    assert not torch.equal(drawn(script, 5, "y").posterior_KCHW, found.posterior_KCHW)
    many = [drawn(script, step) for step in range(1000)]
    counts = torch.bincount(torch.cat([one.template_K for one in many]), minlength=27)
    assert len(counts) == 27
    assert chisquare(counts).pvalue > 1e-3  # the draws are fixed: it holds always or never
    assert abs(torch.cat([one.flip_K for one in many]).float().mean() - 0.5) < 0.03
    noise, sample = (
        torch.cat([getattr(one, name) for one in many]).flatten() for name in ("noise_KCHW", "posterior_KCHW")
    )
    assert abs(sample.std() - 1) < 0.01
    assert abs(torch.corrcoef(torch.stack([noise, sample]))[0, 1]) < 0.01
