"""The walk up the schedule: there and back, rows that diverge, and other models."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.instruments import HostReads
from stages.engine.solver import Occupancy, solve
from stages.inversion.engine import InversionProblem, Rule
from stages.inversion.explicit import Ddim
from stages.inversion.fixed_point import Anderson, FixedPoint
from stages.inversion.lbo import LatentBias
from stages.models.families import open_latent_model, read_geometry
from stages.models.sampler import sample
from stages.models.schedule import ddim_schedule
from stages.models.settings import LatentModelSettings
from stages.models.unet import StableDiffusionXL
from tests.stages.inversion.plain import CONFIG, SHAPE, STEPS, rows_of
from tests.support import tiny_stable_diffusion


def test_generation_is_the_pipelines(model, work) -> None:
    z, condition, schedule = work
    wanted = model.pipeline(
        prompt=["red star", "blue circle", ""],
        latents=z,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(sample(model.predictor(3.0), schedule, z, condition), wanted, rtol=1e-4, atol=1e-4)


def test_a_diverged_row_leaves_nothing_to_its_slot_s_next_one(work) -> None:
    """Not even in Anderson's memory."""
    z, _condition, schedule = work

    def explode(x, t, c):
        return torch.where(c["bad_B"].view(-1, 1, 1, 1), torch.inf, 0.1 * x)

    rows = [{"id": str(i), "z": z[i], "condition": {"bad_B": torch.tensor(i == 0)}} for i in range(3)]
    problem = InversionProblem(explode, schedule, Anderson(5), slots=1, latent_shape=SHAPE)
    assert [row.get("status") for row in solve(problem, rows)] == ["failed", None, None]


@pytest.mark.parametrize("rule", [Ddim(), FixedPoint(1), LatentBias(passes=1), LatentBias(passes=2)])
def test_a_network_that_gives_no_number_at_the_last_pass_is_no_result(work, rule: Rule) -> None:
    z, condition, schedule = work

    def lost(x, t, c):
        return torch.where(t.view(-1, 1, 1, 1) > 500, torch.nan, 0.1 * x)

    problem = InversionProblem(lost, schedule, rule, slots=2, latent_shape=SHAPE)
    assert {row.get("status") for row in solve(problem, rows_of(z, condition))} == {"failed"}


def test_divergence_is_a_failed_row(work) -> None:
    z, condition, schedule = work
    calls = []

    def explode(x, t, c):
        calls.append(1)
        return x * float("inf")

    problem = InversionProblem(explode, schedule, Ddim(), slots=2, latent_shape=SHAPE)
    rows = list(solve(problem, rows_of(z, condition)))
    assert {row["status"] for row in rows} == {"failed"}
    assert "diverged" in rows[0]["error"]
    assert sorted(row["id"] for row in rows) == ["0", "1", "2"]


def test_sdxl_and_v_prediction_run(tmp_path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path / "xl", "sdxl", prediction="v_prediction")
    loaded = open_latent_model(LatentModelSettings(model=folder, device="cpu"))
    geometry = loaded.geometry
    assert isinstance(loaded, StableDiffusionXL)
    assert (geometry.latent_shape, geometry.width) == (SHAPE, 16)
    z = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(2)) * 0.5
    condition = loaded.condition(["red star", "ring"], guided=True)
    schedule = ddim_schedule(geometry.scheduler, 4)
    rule = Anderson(30, tolerance=1e-6)
    problem = InversionProblem(loaded.predictor(1.5), schedule, rule, slots=2, latent_shape=SHAPE)
    seeds = torch.stack([r["noise"] for r in sorted(solve(problem, rows_of(z, condition)), key=lambda r: r["id"])])
    torch.testing.assert_close(sample(loaded.predictor(1.5), schedule, seeds, condition), z, rtol=1e-3, atol=1e-3)
    wanted = loaded.pipeline(
        prompt=["red star", "ring"], latents=seeds, num_inference_steps=4, guidance_scale=1.5, output_type="latent"
    ).images
    torch.testing.assert_close(sample(loaded.predictor(1.5), schedule, seeds, condition), wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_inverted_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match="no diffusers folder"):
        read_geometry(LatentModelSettings(model=str(tmp_path)))
    folder = tiny_stable_diffusion.build(tmp_path / "sd")
    with pytest.raises(ValueError, match="size 20 is no multiple of 8"):  # as diffusers' own pipeline checks
        read_geometry(LatentModelSettings(model=folder, size=20))


RULES = [Ddim(), FixedPoint(2), Anderson(6, tolerance=1e-3), LatentBias(tolerance=1e-5)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rows_are_what_they_are_where_the_device_is_asked_after_each_step(model, work, rule: Rule) -> None:
    z, condition, schedule = work

    def inverted(kind: type[InversionProblem]) -> tuple[dict[str, dict], Occupancy]:
        problem, occupancy = kind(model.predictor(2.0), schedule, rule, slots=2, latent_shape=SHAPE), Occupancy()
        return {row["id"]: row for row in solve(problem, rows_of(z, condition), occupancy=occupancy)}, occupancy

    class Asked(InversionProblem):
        def quiet(self) -> int:
            return 1

    (rows, seldom), (wanted, often) = inverted(InversionProblem), inverted(Asked)
    assert (seldom.steps, seldom.busy_slot_steps) == (often.steps, often.busy_slot_steps)  # none waits to be seen
    for row in wanted.values():
        mine = rows[row["id"]]
        assert torch.equal(mine["noise"], row["noise"])
        assert torch.equal(mine["residual"], row["residual"])
        assert mine["forwards"] == row["forwards"]


@pytest.mark.parametrize(
    ("rule", "most"), [(Ddim(), 1 / 8), (FixedPoint(2), 1 / 8), (LatentBias(), 1 / 3)]
)
def test_how_often_the_host_waits_for_the_device(work, rule: Rule, most: float) -> None:
    """A step, beside loading and unloading."""
    z, condition, _ = work
    schedule = ddim_schedule(CONFIG, 20)
    reads, aside = HostReads(), [0]

    class Watched(InversionProblem):
        def load(self, *given):
            before = reads.counts.total()
            super().load(*given)
            aside[0] += reads.counts.total() - before

        def unload(self, slots):
            before = reads.counts.total()
            rows = super().unload(slots)
            aside[0] += reads.counts.total() - before
            return rows

    occupancy = Occupancy()
    problem = Watched(lambda x, t, c: 0.1 * x, schedule, rule, slots=3, latent_shape=SHAPE)
    with reads:
        assert len(list(solve(problem, rows_of(z, condition), occupancy=occupancy))) == 3
    assert occupancy.steps >= 20
    assert reads.counts.total() - aside[0] <= most * occupancy.steps, reads.counts
