"""Methods on rectified flows, each against a plain loop over one picture, and their way back in diffusers' pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stages.engine.randomness import row_generator, row_normal
from stages.engine.solver import Occupancy
from stages.inversion.pairs import belm_generate, belm_invert, edict_generate, edict_invert
from stages.inversion.schemes import scheme_of
from stages.inversion.settings import InvertImagesSettings, LboMethod, RfInversionMethod
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.stages.inversion.plain import run
from tests.stages.inversion.test_stage import picture
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


def scheme_rows(work) -> list[dict[str, Any]]:
    z, condition, _ = work
    told = [{name: value[i] for name, value in condition.items()} for i in range(len(z))]
    return [{"id": f"picture {i}", "z": z[i], "condition": told[i]} for i in range(len(z))]


def test_rf_inversion_is_its_plain_loop_there_and_back(model, work) -> None:
    """Equations 8 and 15 in the paper's time, from the picture (0) to the noise (1) and back."""
    gamma, eta = 0.6, 0.8
    method = RfInversionMethod(gamma=gamma, eta=eta, steered=0.5)
    scheme = scheme_of(method, model, steps=STEPS, guidance=1.0)
    done = list(scheme.invert(scheme_rows(work), 2, Occupancy()))
    told = {name: torch.stack([row["condition"][name] for row in done]) for name in done[0]["condition"]}
    again = scheme.generate(
        torch.stack([row["noise"] for row in done]), told, torch.stack([row["picture_latent"] for row in done])
    )
    for i, row in enumerate(done):
        flow = Flow(model, work, i)
        y = torch.randn(SHAPE, generator=row_generator(0, row["id"], "rf-inversion"))
        z = flow.z_0
        for s, s_next in flow.steps():
            unconditional = flow(z, s)
            z = z + (unconditional + gamma * ((y - z) / (1 - s) - unconditional)) * (s_next - s)
        torch.testing.assert_close(row["noise"], z[0], rtol=1e-4, atol=1e-5)
        assert row["forwards"] == STEPS
        for n, (s, s_next) in enumerate(reversed(flow.steps())):
            v = -flow(z, s_next)
            v = v + (eta if n < 2 else 0.0) * ((flow.z_0 - z) / s_next - v)
            z = z + v * (s_next - s)
        torch.testing.assert_close(again[i], z[0], rtol=1e-4, atol=1e-5)


def test_rf_inversion_ends_at_the_noise_and_at_the_picture_where_it_is_all_steered(model, work) -> None:
    scheme = scheme_of(RfInversionMethod(gamma=1.0, eta=1.0, steered=1.0), model, steps=STEPS, guidance=1.0)
    done = list(scheme.invert(scheme_rows(work), 3, Occupancy()))
    noise = row_normal(SHAPE, 0, [row["id"] for row in done], "rf-inversion")
    torch.testing.assert_close(torch.stack([row["noise"] for row in done]), noise, rtol=1e-4, atol=1e-4)
    told = {name: torch.stack([row["condition"][name] for row in done]) for name in done[0]["condition"]}
    back = scheme.generate(noise, told, work[0])
    torch.testing.assert_close(back, work[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["input", "output"])
@pytest.mark.parametrize("passes", [2, 5])
def test_shown_what_it_was_shown_the_network_gives_the_picture_back(model, work, bias: str, passes: int) -> None:
    """However far from solved; a plain loop shows the network the latent and the stored bias. No pass goes into it."""
    method = LboMethod(replay="shown", passes=passes, tolerance=0.0, bias=bias)
    scheme = scheme_of(method, model, steps=STEPS, guidance=1.0)
    for row in scheme.invert(scheme_rows(work), 2, Occupancy()):
        i = int(row["id"].split()[1])
        flow = Flow(model, work, i)
        z = row["noise"][None]
        for k, (s, s_next) in reversed(list(enumerate(flow.steps()))):
            z = z - (s_next - s) * flow(z + row["input_bias"][k], s_next)
        torch.testing.assert_close(z, flow.z_0, rtol=1e-4, atol=1e-5)
        assert row["forwards"] == passes * STEPS
        told = {name: value[None] for name, value in row["condition"].items()}
        torch.testing.assert_close(scheme.generate(row["noise"][None], told, row["input_bias"][None]), z)


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


def test_a_steered_row_holds_what_it_needs_to_come_back(folders) -> None:
    """`picture_latent` is the encoder's."""
    method = {"method": "rf-inversion", "eta": 1.0, "steered": 1.0}
    settings = told(folders["flux-dev"], methods=[method], steps=STEPS, size=16)
    stage = InvertImages(settings)
    columns = {column.name: column for column in InvertImages.describe(settings).columns}
    (row,) = stage([{"id": "a", "image": picture(0), "prompt": "red star", "method": "rf-inversion"}])
    assert (row["status"], row["psnr_decoded"] > 60) == ("ok", True), row["error"]
    assert row["picture_latent"].shape == columns["picture_latent"].shape == SHAPE
    assert "residual" not in row
    x = torch.from_numpy(np.asarray(row["picture"]).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(torch.from_numpy(row["picture_latent"]), stage.model.encode(x)[0], rtol=1e-4, atol=1e-4)


def told(folder: str, **options: Any) -> InvertImagesSettings:
    return InvertImagesSettings(model=folder, device="cpu", **options)


def test_methods_of_the_other_equation_are_refused(folders) -> None:
    for name in ("ddim", "null-text"):
        with pytest.raises(ValueError, match=f"method {name} does not invert a rectified flow, .* take euler"):
            InvertImages.describe(told(folders["flux-dev"], methods=[name]))
    for name in ("euler", "rf-solver", "fireflow", "rf-inversion"):
        with pytest.raises(ValueError, match=f"method {name} does not invert a variance-preserving .* take ddim"):
            InvertImages.describe(InvertImagesSettings(methods=[name]))
