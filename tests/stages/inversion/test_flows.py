"""Methods on rectified flows, each against a plain loop over one picture, and their way back in diffusers' pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.inversion.pairs import belm_generate, belm_invert, edict_generate, edict_invert
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.stages.inversion.plain import run
from tests.support import tiny_flows

STEPS = 4
SHAPE = (16, 8, 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: tiny_flows.build(tmp_path_factory.mktemp(kind), kind) for kind in ("flux-dev", "sd35-medium")}


@pytest.fixture(scope="module")
def model(folders):
    return open_latent_model(LatentModelSettings(model=folders["flux-dev"], device="cpu"))


@pytest.fixture(scope="module")
def work(model):
    z = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(1)) * 0.8
    return z, model.condition(["red star", "blue circle", ""]), model.schedule(STEPS)


class Flow:
    """One picture's velocity, and the sigmas from the picture to the noise."""

    def __init__(self, model, work, i: int) -> None:
        z, condition, schedule = work
        self.own = {name: value[i : i + 1] for name, value in condition.items()}
        self.z_0, self.sigmas = z[i : i + 1], [0.0, *schedule.sigma_S.tolist()]
        self.model = model

    def __call__(self, z: torch.Tensor, sigma: float) -> torch.Tensor:
        with torch.no_grad():
            return self.model.predictor()(z, torch.tensor([1000 * sigma]), self.own)

    def steps(self) -> list[tuple[float, float]]:
        return list(zip(self.sigmas, self.sigmas[1:], strict=False))


def euler(v: Flow) -> torch.Tensor:
    z = v.z_0
    for s, s_next in v.steps():
        z = z + (s_next - s) * v(z, s)
    return z


def midpoint(v: Flow) -> torch.Tensor:
    """As the paper writes it: second order in Taylor's series, the derivative by a difference."""
    z = v.z_0
    for s, s_next in v.steps():
        d = s_next - s
        now = v(z, s)
        derivative = (v(z + d / 2 * now, s + d / 2) - now) / (d / 2)
        z = z + d * now + d**2 / 2 * derivative
    return z


def fireflow(v: Flow) -> torch.Tensor:
    z, last = v.z_0, None
    for s, s_next in v.steps():
        d = s_next - s
        last = v(z + d / 2 * (v(z, s) if last is None else last), s + d / 2)
        z = z + d * last
    return z


def uni_inv(v: Flow) -> torch.Tensor:
    z, last = v.z_0, None
    for s, s_next in v.steps():
        d = s_next - s
        last = v(z if last is None else z + d * last, s_next)
        z = z + d * last
    return z


def iterated(passes: int, averaged: bool = False, renoised: bool = False):
    def climb(v: Flow) -> torch.Tensor:
        z = v.z_0
        for s, s_next in v.steps():
            x, seen = z, []
            for _ in range(passes):
                seen.append(z + (s_next - s) * v(x, s_next))
                x = (seen[-1] + seen[-2]) / 2 if averaged and len(seen) > 1 else seen[-1]
            z = (seen[-1] + seen[-2]) / 2 if renoised and 1000 * s_next < 250 else x
        return z

    return climb


REFERENCES: dict[str, tuple[dict[str, Any], Any, int]] = {
    "euler": ({"method": "euler"}, euler, STEPS),
    "rf-solver": ({"method": "rf-solver"}, midpoint, 2 * STEPS),
    "fireflow": ({"method": "fireflow"}, fireflow, STEPS + 1),
    "uni-inv": ({"method": "uni-inv"}, uni_inv, STEPS),
    "fixed-point": ({"method": "fixed-point", "iterations": 3}, iterated(4), 4 * STEPS),
    "averaged": ({"method": "fixed-point", "iterations": 3, "acceleration": "averaged"}, iterated(4, True), 4 * STEPS),
    "renoise": ({"method": "renoise"}, iterated(2, renoised=True), 2 * STEPS),
}


@pytest.mark.parametrize("name", list(REFERENCES))
def test_every_method_ends_where_its_plain_loop_does(model, work, name: str) -> None:
    told, reference, passes = REFERENCES[name]
    method = InvertImagesSettings(methods=(told,)).methods[0]
    for i, row in enumerate(run(model, work, method.rule(1.0), shape=SHAPE)):
        torch.testing.assert_close(row["noise"], reference(Flow(model, work, i))[0], rtol=1e-4, atol=1e-5)
        assert row["forwards"] == passes
        assert ("residual" in row) == (name not in ("euler", "rf-solver", "fireflow"))


def test_converging_methods_invert_the_sampler(model, work) -> None:
    """Down again by a plain loop: the picture's latent comes back."""
    anderson = {"method": "fixed-point", "iterations": 20, "acceleration": "anderson", "tolerance": 1e-6}
    for told in (anderson, {"method": "lbo", "tolerance": 1e-6, "passes": 20}):
        method = InvertImagesSettings(methods=(told,)).methods[0]
        for i, row in enumerate(run(model, work, method.rule(1.0), shape=SHAPE, slots=3)):
            flow = Flow(model, work, i)
            z = row["noise"][None]
            for s, s_next in reversed(flow.steps()):
                z = z + (s - s_next) * flow(z, s_next)
            assert float((z - flow.z_0).abs().max()) < 1e-4, told
            assert float(row["residual"].max()) <= 1e-6


def test_exact_pairs_need_no_signal(model, work) -> None:
    z, condition, schedule = work
    assert float(schedule.alpha_S[-1]) == 0
    for up, down in ((belm_invert, belm_generate), (edict_invert, edict_generate)):
        pair = up(model.predictor(), schedule, z, condition)
        assert bool(torch.stack(pair).isfinite().all())
        torch.testing.assert_close(down(model.predictor(), schedule, pair, condition), z, rtol=1e-4, atol=1e-4)


def test_belm_samples_the_published_recursion(model, work) -> None:
    """O-BELM over sigma, term by term, float64: from the pair down to z_0."""
    z, condition, schedule = work
    top, below = belm_invert(model.predictor(), schedule, z, condition)
    flow = Flow(model, work, 0)
    older, newer = top[:1].double(), below[:1].double()
    for i in range(STEPS - 1, 0, -1):
        h, h_next = flow.sigmas[i] - flow.sigmas[i - 1], flow.sigmas[i + 1] - flow.sigmas[i]
        slope = flow(newer.float(), flow.sigmas[i]).double()
        ratio = (h / h_next) ** 2
        older, newer = newer, ratio * older + (1 - ratio) * newer - h * (h + h_next) / h_next * slope
    torch.testing.assert_close(newer.float(), flow.z_0, rtol=1e-3, atol=1e-4)


def told(folder: str, **options: Any) -> InvertImagesSettings:
    return InvertImagesSettings(model=folder, device="cpu", **options)


def test_methods_of_the_other_equation_are_refused(folders) -> None:
    for name in ("ddim", "null-text"):
        with pytest.raises(ValueError, match=f"method {name} does not invert a rectified flow, .* take euler"):
            InvertImages.describe(told(folders["flux-dev"], methods=[name]))
    for name in ("euler", "rf-solver", "fireflow"):
        with pytest.raises(ValueError, match=f"method {name} does not invert a variance-preserving .* take ddim"):
            InvertImages.describe(InvertImagesSettings(methods=[name]))
