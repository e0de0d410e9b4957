"""Every method against a plain one-picture loop written from its formula, in float64 where that helps."""

from __future__ import annotations

import pytest
import torch

from stages.engine.solver import solve
from stages.inversion import pairs as exact_pair
from stages.inversion.engine import InversionProblem
from stages.inversion.exact import Exact
from stages.inversion.explicit import Ddim
from stages.inversion.fixed_point import Anderson, Averaged, FixedPoint
from stages.inversion.newton import Newton
from stages.inversion.null_text import generate_null_text, learn_null_text
from stages.inversion.renoise import ReNoise
from stages.models.families import open_latent_model, read_geometry
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.models.schedule import ddim_schedule
from stages.models.settings import LatentModelSettings
from tests.support import tiny_stable_diffusion

SHAPE = (4, 8, 8)
STEPS = 5
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentModel:
    folder = tiny_stable_diffusion.build(tmp_path_factory.mktemp("sd"))
    return open_latent_model(LatentModelSettings(model=folder, device="cpu"))


@pytest.fixture(scope="module")
def work(model: LatentModel):
    """Three latents with their conditions, and the schedule."""
    z = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(1)) * 0.8
    condition = model.condition(["red star", "blue circle", ""], guided=True)
    return z, condition, ddim_schedule(CONFIG, STEPS)


def rows_of(z, condition):
    return [
        {"id": str(i), "z": z[i], "condition": {name: value[i] for name, value in condition.items()}}
        for i in range(len(z))
    ]


def run(model, work, rule, *, guidance=1.0, slots=2, **options):
    z, condition, schedule = work
    problem = InversionProblem(model.predictor(guidance), schedule, rule, slots=slots, latent_shape=SHAPE, **options)
    return sorted(solve(problem, rows_of(z, condition)), key=lambda row: row["id"])


def climb(model, work, i, solve_step):
    """One picture alone: solve_step(z_prev, D, g, eps, t, phi, psi) gives z_t."""
    z, condition, schedule = work
    own = {name: value[i : i + 1] for name, value in condition.items()}
    z = z[i : i + 1]
    for k in range(STEPS):
        a, b = float(schedule.alpha_S[k]), float(schedule.alpha_prev_S[k])
        phi = b / a
        psi = (1 - b * b) ** 0.5 - phi * (1 - a * a) ** 0.5
        t = schedule.t_S[k : k + 1]

        def eps(x, t=t):
            with torch.set_grad_enabled(x.requires_grad):
                return model.forward(x, t, own)

        z = solve_step(z, eps, int(t), phi, psi, a, b)
    return z[0]


def ddim(z, eps, t, phi, psi, a, b):
    return (z - psi * eps(z)) / phi


def plain(z_prev, eps, t, phi, psi, a, b, iterations=4):
    z = z_prev
    for _ in range(iterations + 1):
        z = (z_prev - psi * eps(z)) / phi
    return z


def averaged(z_prev, eps, t, phi, psi, a, b, iterations=4):
    values, z = [], z_prev
    for _ in range(iterations + 1):
        values.append((z_prev - psi * eps(z)) / phi)
        z = sum(values[-2:]) / len(values[-2:])
    return z


def anderson(z_prev, eps, t, phi, psi, a, b, iterations=4, window=2):
    xs, gs, z = [], [], z_prev
    for _ in range(iterations + 1):
        xs.append(z.double().flatten())
        gs.append(((z_prev - psi * eps(z)) / phi).double().flatten())
        f = [g - x for x, g in zip(xs, gs, strict=True)][-window - 1 :]
        g = gs[-window - 1 :]
        if len(f) == 1:
            new = g[-1]
        else:
            differences = torch.stack([f[-1] - other for other in f[:-1]], 1)
            theta = torch.linalg.lstsq(differences, f[-1][:, None]).solution[:, 0]
            new = g[-1] - torch.stack([g[-1] - other for other in g[:-1]], 1) @ theta
        z = new.float().view_as(z_prev)
    return z


def renoise(z_prev, eps, t, phi, psi, a, b):
    first = (z_prev - psi * eps(z_prev)) / phi
    second = (z_prev - psi * eps(first)) / phi
    return (first + second) / 2 if t < 250 else second


def exact(z_prev, eps, t, phi, psi, a, b, iterations=6, warmup=3):
    z = (z_prev - psi * eps(z_prev)) / phi
    for i in range(1, iterations + 1):
        residual = phi * z + psi * eps(z) - z_prev
        if residual.square().sum() <= 1e-3:
            return z
        z = z - 0.5 * min(i / warmup, 1.0) * residual
    return z


def newton(z_prev, eps, t, phi, psi, a, b, iterations=2, prior=0.1):
    z, best, score = z_prev, None, float("inf")
    for i in range(iterations + 1):
        z = z.detach().requires_grad_(True)
        g = (z_prev - psi * eps(z)) / phi
        mismatch = (g - z).abs().sum()
        if mismatch.item() < score:
            best, score = g.detach(), mismatch.item()
        if i == iterations:
            break
        value = mismatch + prior / (1 - a * a) * ((z - a / b * z_prev).square().sum() + 1e-12).sqrt()
        (slope,) = torch.autograd.grad(value, z)
        z = z - value * slope / (z.numel() * (slope**2 + slope.square().mean()))
    return best


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (Ddim(), ddim),
        (FixedPoint(4), plain),
        (Averaged(4), averaged),
        (Anderson(4, window=2), anderson),
        (ReNoise(), renoise),
        (Exact(iterations=6, warmup=3), exact),
        (Newton(), newton),
    ],
    ids=["ddim", "fixed-point", "averaged", "anderson", "renoise", "exact", "newton"],
)
def test_a_rule_is_its_formula(model, work, rule, reference) -> None:
    for i, row in enumerate(run(model, work, rule)):
        wanted = climb(model, work, i, reference)
        torch.testing.assert_close(row["noise"], wanted, rtol=1e-3, atol=1e-4)


def test_ddim_is_diffusers_inverse_scheduler(model, work) -> None:
    from diffusers import DDIMInverseScheduler

    z, condition, _schedule = work
    scheduler = DDIMInverseScheduler.from_config({**CONFIG, "clip_sample": False})
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        with torch.no_grad():
            z = scheduler.step(model.forward(z, t.expand(3), condition), int(t), z).prev_sample
    seeds = torch.stack([row["noise"] for row in run(model, work, Ddim())])
    assert (seeds - z).abs().max() < 1e-4


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


def test_rows_are_independent_of_their_company(model, work) -> None:
    rule = Anderson(9, tolerance=1e-4)
    together, alone = run(model, work, rule, slots=3), run(model, work, rule, slots=1)
    for one, other in zip(together, alone, strict=True):
        assert one["forwards"] == other["forwards"]
        torch.testing.assert_close(one["noise"], other["noise"], rtol=1e-4, atol=1e-5)
    assert all(row["residual"].max() <= 1e-4 or row["forwards"] >= 10 for row in together)


def test_a_converged_seed_regenerates_its_latent_under_guidance(model, work) -> None:
    z, condition, schedule = work
    rule = Anderson(150, window=8, tolerance=3e-6)
    found = run(model, work, rule, guidance=2.0)
    assert all(float(row["residual"].max()) <= 3e-6 for row in found)
    seeds = torch.stack([row["noise"] for row in found])
    again = sample(model.predictor(2.0), schedule, seeds, condition)
    torch.testing.assert_close(again, z, rtol=1e-3, atol=2e-3)


def test_a_diverged_row_leaves_nothing_to_its_slot_s_next_one(work) -> None:
    """Not even in Anderson's memory."""
    z, _condition, schedule = work

    def explode(x, t, c):
        return torch.where(c["bad_B"].view(-1, 1, 1, 1), torch.inf, 0.1 * x)

    rows = [{"id": str(i), "z": z[i], "condition": {"bad_B": torch.tensor(i == 0)}} for i in range(3)]
    problem = InversionProblem(explode, schedule, Anderson(5), slots=1, latent_shape=SHAPE)
    assert [row.get("status") for row in solve(problem, rows)] == ["failed", None, None]


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


def test_belm_is_its_formula_and_comes_back(model, work) -> None:
    z, condition, schedule = work
    pair = exact_pair.belm_invert(model.forward, schedule, z, condition)
    again = exact_pair.belm_generate(model.forward, schedule, pair, condition)
    torch.testing.assert_close(again, z, rtol=1e-2, atol=1e-2)
    # One sampling step in the paper's own variables, from the last pair.
    a = [float(schedule.alpha_prev_S[0]), *schedule.alpha_S.tolist()]
    s = [float(schedule.sigma_prev_S[0]) / a[0], *(schedule.sigma_S / schedule.alpha_S).tolist()]
    n = STEPS - 1
    h, h_next = s[n] - s[n - 1], s[n + 1] - s[n]
    with torch.no_grad():
        eps = model.forward(pair[1], schedule.t_S[n - 1].expand(3), condition)
    lower = a[n - 1] * (
        h**2 / h_next**2 * pair[0] / a[n + 1]
        + (1 - h**2 / h_next**2) * pair[1] / a[n]
        - h * (h + h_next) / h_next * eps
    )
    shorter = exact_pair.belm_invert(model.forward, schedule, z, condition)
    torch.testing.assert_close(shorter[0], pair[0])
    # The latent two below the top, on the way up, is what the formula gives on the way down.
    path = _belm_path(model, work)
    torch.testing.assert_close(lower, path[n - 1], rtol=1e-3, atol=1e-3)


def _belm_path(model, work):
    """O-BELM inversion as a plain loop over alpha-scaled latents, all points kept."""
    z, condition, schedule = work
    a = [float(schedule.alpha_prev_S[0]), *schedule.alpha_S.tolist()]
    s = [float(schedule.sigma_prev_S[0]) / a[0], *(schedule.sigma_S / schedule.alpha_S).tolist()]
    with torch.no_grad():
        first = a[1] * (z / a[0] + (s[1] - s[0]) * model.forward(z, schedule.t_S[0].expand(3), condition))
        path = [z, first]
        for i in range(1, STEPS):
            h, h_next = s[i] - s[i - 1], s[i + 1] - s[i]
            eps = model.forward(path[i], schedule.t_S[i - 1].expand(3), condition)
            known = path[i - 1] / a[i - 1] - (1 - h**2 / h_next**2) * path[i] / a[i] + h * (h + h_next) / h_next * eps
            path.append(a[i + 1] * h_next**2 / h**2 * known)
    return path


def test_edict_is_undone_by_its_sampler(model, work) -> None:
    z, condition, schedule = work
    x, y = exact_pair.edict_invert(model.forward, schedule, z, condition)
    assert (x - y).abs().max() > 1e-6
    # The published sampling equations, written out.
    for k in range(STEPS - 1, -1, -1):
        phi = float(schedule.alpha_prev_S[k] / schedule.alpha_S[k])
        psi = float(schedule.sigma_prev_S[k]) - phi * float(schedule.sigma_S[k])
        t = schedule.t_S[k].expand(3)
        with torch.no_grad():
            x_mid = phi * x + psi * model.forward(y, t, condition)
            y_mid = phi * y + psi * model.forward(x_mid, t, condition)
        x = 0.93 * x_mid + 0.07 * y_mid
        y = 0.93 * y_mid + 0.07 * x
    torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-3)
    pair = exact_pair.edict_invert(model.forward, schedule, z, condition)
    torch.testing.assert_close(
        exact_pair.edict_generate(model.forward, schedule, pair, condition), x, rtol=1e-4, atol=1e-4
    )


def test_null_text_is_the_published_loop(model, work) -> None:
    z, condition, schedule = work
    rows = run(model, work, Ddim(), keep_path=True)
    path = torch.stack([row["path"] for row in rows])
    torch.testing.assert_close(path[:, 0], z)
    learned = learn_null_text(model.forward, schedule, path, condition, guidance=7.5, iterations=3)
    again = generate_null_text(model.forward, schedule, path[:, -1], condition, learned.null_BSLE, guidance=7.5)
    torch.testing.assert_close(again, learned.z_BCHW, rtol=1e-4, atol=1e-4)
    for row in range(2):
        text, null = condition["text_BLE"][row : row + 1], condition["null_text_BLE"][row : row + 1].clone()
        z_row = path[row : row + 1, -1]
        for i, k in enumerate(range(STEPS - 1, -1, -1)):
            step, t = schedule.at(torch.tensor([k])), schedule.t_S[k : k + 1]
            null = null.detach().clone().requires_grad_(True)
            adam = torch.optim.Adam([null], lr=1e-2 * (1 - i / 100))
            with torch.no_grad():
                conditioned = model.unet(z_row, t, text).sample
            for _ in range(3):
                base = model.unet(z_row, t, null).sample
                loss = torch.nn.functional.mse_loss(
                    step.down(z_row, base + 7.5 * (conditioned - base)), path[row : row + 1, k]
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
                if loss.item() < 1e-5 + 2e-5 * i:
                    break
            with torch.no_grad():
                base = model.unet(z_row, t, null).sample
                z_row = step.down(z_row, base + 7.5 * (conditioned - base))
        torch.testing.assert_close(learned.z_BCHW[row], z_row[0], rtol=2e-2, atol=5e-3)


def test_sdxl_and_v_prediction_run(tmp_path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path / "xl", "sdxl", prediction="v_prediction")
    settings = LatentModelSettings(model=folder, device="cpu")
    loaded, geometry = open_latent_model(settings), read_geometry(settings)
    assert (type(loaded).__name__, geometry.latent_shape, geometry.size) == ("StableDiffusionXL", SHAPE, 16)
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
    with pytest.raises(ValueError, match="multiple of 4"):
        read_geometry(LatentModelSettings(model=folder, size=18))
