"""Latent Bias Optimization: both forms of the bias, the warm start, the fallback, and replay."""

from __future__ import annotations

import pytest
import torch

from stages.engine.solver import solve
from stages.inversion.engine import Evaluation, InversionProblem
from stages.inversion.exact import Exact
from stages.inversion.fixed_point import Anderson, FixedPoint
from stages.inversion.lbo import LatentBias, replay_bias
from stages.models.flow_schedule import FlowGrid, flow_schedule
from stages.models.sampler import sample
from stages.models.schedule import ddim_schedule

SHAPE = (2, 4, 4)
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
N = 32


def network(strength: float):
    """A smooth stand-in for a U-Net: every output depends on every input, the more the larger `strength`."""
    mixing = torch.randn((N, N), generator=torch.Generator().manual_seed(3)) * strength / N**0.5

    def predict(z, t, condition):
        return torch.tanh(z.flatten(1) @ mixing + condition["c"] + t.float()[:, None] / 1000).view_as(z)

    return predict


def rows(count: int = 4):
    z = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(4))
    c = torch.randn((count, N), generator=torch.Generator().manual_seed(5)) * 0.3
    return [{"id": str(i), "z": z[i], "condition": {"c": c[i]}} for i in range(count)]


def invert(rule, *, strength=0.8, steps=6, slots=3, **options):
    schedule = ddim_schedule(CONFIG, steps)
    problem = InversionProblem(network(strength), schedule, rule, slots=slots, latent_shape=SHAPE, **options)
    done = sorted(solve(problem, rows()), key=lambda row: row["id"])
    condition = {"c": torch.stack([row["condition"]["c"] for row in done])}
    seeds = torch.stack([row["noise"] for row in done])
    again = sample(network(strength), schedule, seeds, condition)
    error = (again - torch.stack([row["z"] for row in done])).flatten(1).norm(dim=1)
    passes = sum(row["forwards"] for row in done) / len(done) / steps
    return done, float(error.max()), passes


@pytest.mark.parametrize("bias", ["output", "input"])
def test_every_bias_comes_nearer_than_ddim_within_its_budget(bias) -> None:
    _, ddim, _ = invert(FixedPoint(1))
    _, error, passes = invert(LatentBias(bias=bias, passes=12, tolerance=0.0))
    assert error < ddim / 2, (error, ddim)
    assert passes <= 12


@pytest.mark.parametrize("start", ["none", "last", "linear", "fitted"])
def test_the_first_point_carries_the_last_output(start) -> None:
    schedule = ddim_schedule(CONFIG, 4)
    rule = LatentBias(warm_start=start, passes=1, tolerance=0.0)
    outputs = torch.randn((3, 1, *SHAPE), generator=torch.Generator().manual_seed(6))
    outputs[2] = outputs[1] + 0.4 * (outputs[1] - outputs[0]) + 0.1 * outputs[2]  # nearly on a line
    z = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(7))
    yes, state = torch.tensor([True]), rule.blank(z)
    for k in range(3):
        step = schedule.at(torch.tensor([k]))
        x, state = rule.begin(z, step, state)
        # The row ends the step at the point that this output gives.
        z_next = step.up(z, outputs[k])
        r = step.down(x, outputs[k]) - z
        point = Evaluation(rule, x, outputs[k], z, step, r, torch.tensor([1.0]), torch.tensor([1]))
        state = rule.ended(point, state, yes, z_next)
        z = z_next
    point, _ = rule.begin(z, schedule.at(torch.tensor([3])), state)
    before, now = (outputs[1] - outputs[0]).double().numpy().ravel(), (outputs[2] - outputs[1]).double().numpy().ravel()
    share = min(max(now @ before / (before @ before), 0.0), 1.5)
    shares = {"none": None, "last": 0.0, "linear": 1.0, "fitted": share}
    expected = None if start == "none" else outputs[2] + shares[start] * (outputs[2] - outputs[1])
    step = schedule.at(torch.tensor([3]))
    wanted = z if expected is None else step.up(z, expected)
    torch.testing.assert_close(point, wanted, rtol=1e-3, atol=1e-3)


def test_each_row_stops_by_itself() -> None:
    done, _, _ = invert(LatentBias(tolerance=1e-4, passes=40))
    assert all(float(row["residual"].max()) <= 1e-4 for row in done)
    assert len({row["forwards"] for row in done}) > 1


def test_where_the_fixed_point_expands_it_comes_nearer_all_the_same() -> None:
    strong = {"strength": 6.0, "steps": 4}
    _, running_away, _ = invert(FixedPoint(40), **strong)
    _, safe, _ = invert(LatentBias(passes=40, tolerance=1e-5), **strong)
    assert safe < running_away / 2, (safe, running_away)


@pytest.mark.parametrize("passes", range(5, 12))
@pytest.mark.parametrize("bias", ["output", "input"])
def test_a_row_leaves_a_step_with_its_best_residual_and_that_latent(bias: str, passes: int) -> None:
    """Of each step against all that the network was shown in it; the point beyond the best one is taken only where
    nothing came out worse since."""
    shown: list[torch.Tensor] = []

    def predict(z, t, condition):
        shown.append(z.clone())
        return network(6.0)(z, t, condition)

    schedule = ddim_schedule(CONFIG, 1)
    rule = LatentBias(bias=bias, passes=passes, tolerance=0.0)  # type: ignore[arg-type]
    problem = InversionProblem(predict, schedule, rule, slots=1, latent_shape=SHAPE)
    (row,) = solve(problem, rows(1))
    step, z, c = schedule.at(torch.tensor([0])), row["z"][None], {"c": row["condition"]["c"][None]}
    points = shown[1:] if bias == "output" else shown
    residuals = [
        float((step.down(x, network(6.0)(x, step.t_B, c)) - z).norm() / z.norm()) for x in points
    ]
    assert float(row["residual"][0]) == pytest.approx(min(residuals), rel=1e-4)
    if residuals[-1] > min(residuals):
        best = points[residuals.index(min(residuals))]
        torch.testing.assert_close(row["noise"][None], best)


@pytest.mark.parametrize("rule", [FixedPoint(3), LatentBias(passes=40, tolerance=1e-5)])
def test_the_network_is_not_shown_empty_slots(rule) -> None:
    strong, given = network(6.0), rows()
    shown: list[int] = []

    def predict(z, t, condition):
        assert len(z) == len(t) == len(condition["c"])
        shown.append(len(z))
        return strong(z, t, condition)

    def seeds(slots: int) -> torch.Tensor:
        problem = InversionProblem(predict, ddim_schedule(CONFIG, 4), rule, slots=slots, latent_shape=SHAPE)
        return torch.stack([row["noise"] for row in sorted(solve(problem, given), key=lambda row: row["id"])])

    many, seen = seeds(16), max(shown)
    assert seen == len(given)
    torch.testing.assert_close(many, seeds(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "rule",
    [LatentBias(passes=30, tolerance=1e-6), Anderson(29, 1e-6), FixedPoint(29, 1e-6), Exact(29, 1.0, 0, 1e-9)],
    ids=["lbo", "anderson", "plain", "exact"],
)
def test_a_tolerance_below_the_networks_noise_does_not_cost_all_passes(rule) -> None:
    """What the network sees and says is rounded to bfloat16. Stopping in its noise costs no accuracy that was there."""
    schedule = ddim_schedule(CONFIG, 6)

    def rounded(z, t, condition):
        return network(0.8)(z.bfloat16().float(), t, condition).bfloat16().float()

    def inverted(noise: float) -> tuple[float, float]:
        problem = InversionProblem(rounded, schedule, rule, slots=3, latent_shape=SHAPE, noise=noise)
        done = sorted(solve(problem, rows()), key=lambda row: row["id"])
        condition = {"c": torch.stack([row["condition"]["c"] for row in done])}
        again = sample(network(0.8), schedule, torch.stack([row["noise"] for row in done]), condition)
        error = (again - torch.stack([row["z"] for row in done])).flatten(1).norm(dim=1).mean()
        return float(error), sum(row["forwards"] for row in done) / len(done) / 6

    (all_error, all_passes), (error, passes) = inverted(0.0), inverted(torch.finfo(torch.bfloat16).eps)
    assert all_passes > 15
    assert passes < 0.7 * all_passes
    assert error < 1.5 * all_error


def test_who_asks_for_a_number_of_passes_gets_them() -> None:
    for rule in (LatentBias(passes=12, tolerance=0.0), FixedPoint(11), Exact(11, 0.5, 5, 0.0)):
        problem = InversionProblem(network(6.0), ddim_schedule(CONFIG, 3), rule, slots=3, latent_shape=SHAPE, noise=1e3)
        assert all(row["forwards"] == 36 for row in solve(problem, rows()))


def test_replay_gives_the_inverted_latent_back() -> None:
    done, error, _ = invert(LatentBias(passes=1, tolerance=0.0, warm_start="none"), keep_path=True)
    schedule = ddim_schedule(CONFIG, 6)
    condition = {"c": torch.stack([row["condition"]["c"] for row in done])}
    path = torch.stack([row["path"] for row in done])
    bias = replay_bias(network(0.8), schedule, path, condition)
    again = sample(network(0.8), schedule, path[:, -1], condition, bias)
    assert error > 1e-3
    torch.testing.assert_close(again, path[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["output", "input"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_that_changes_nothing_is_climbed(bias, prediction) -> None:
    """With `steps_offset: 0` and `set_alpha_to_one: false` the first step goes from t = 0 to alpha_0: weight 0."""
    config = {**CONFIG, "steps_offset": 0, "prediction_type": prediction}
    schedule = ddim_schedule(config, 20)
    assert float(schedule.weight_S[0]) == 0
    rule = LatentBias(bias=bias, passes=30, tolerance=1e-6)
    problem = InversionProblem(network(0.5), schedule, rule, slots=3, latent_shape=SHAPE)
    done = sorted(solve(problem, rows()), key=lambda row: row["id"])
    assert all(row.get("status") != "failed" for row in done)
    condition = {"c": torch.stack([row["condition"]["c"] for row in done])}
    again = sample(network(0.5), schedule, torch.stack([row["noise"] for row in done]), condition)
    torch.testing.assert_close(again, torch.stack([row["z"] for row in done]), rtol=1e-3, atol=1e-3)


def test_a_diverged_row_is_not_told_to_use_what_failed() -> None:
    def broken(z, t, condition):
        return torch.full_like(z, torch.nan)

    for rule in (LatentBias(), FixedPoint(3)):
        problem = InversionProblem(broken, ddim_schedule(CONFIG, 4), rule, slots=2, latent_shape=SHAPE)
        (said,) = {row["error"] for row in solve(problem, rows())}
        assert ("method lbo" in said) == isinstance(rule, FixedPoint)
        assert "method" in said


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        LatentBias(bias="output", passes=1)


def test_a_step_that_is_no_contraction_is_solved_where_it_has_one_root() -> None:
    """A made-up velocity whose single step stretches by up to 3: the plain iteration runs away, in one step even where
    there is a root; in four steps each is a contraction, and LBO is at its tolerance in few passes."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(-3, 0.5, 256)[torch.randperm(256, generator=generator)].view(4, 8, 8)
    rows = [
        {"id": str(i), "z": torch.randn(4, 8, 8, generator=generator), "condition": {"text_BLE": torch.zeros(1, 1)}}
        for i in range(3)
    ]

    def predict(z_BCHW: torch.Tensor, t_B: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        return spread * z_BCHW

    def worst(rule, steps: int) -> list[float]:
        schedule = flow_schedule({}, steps, FlowGrid(linear="float64"))
        problem = InversionProblem(predict, schedule, rule, slots=3, latent_shape=(4, 8, 8))
        return [float(row["residual"].max()) for row in solve(problem, [dict(row) for row in rows])]

    assert min(worst(FixedPoint(39), 1)) > 1e3
    assert max(worst(LatentBias(passes=60, tolerance=1e-3), 1)) <= 1e-3
    assert max(worst(LatentBias(passes=10, tolerance=1e-3), 4)) <= 1e-3
