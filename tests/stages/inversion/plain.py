"""A row's way up the schedule as a plain loop over one picture, for rules to be held against."""

from __future__ import annotations

import torch

from stages.engine.solver import solve
from stages.inversion.engine import InversionProblem

SHAPE = (4, 8, 8)
STEPS = 5
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def rows_of(z, condition):
    return [
        {"id": str(i), "z": z[i], "condition": {name: value[i] for name, value in condition.items()}}
        for i in range(len(z))
    ]


def run(model, work, rule, *, guidance=1.0, slots=2, shape=SHAPE, **options):
    z, condition, schedule = work
    problem = InversionProblem(model.predictor(guidance), schedule, rule, slots=slots, latent_shape=shape, **options)
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
                return model.predictor()(x, t, own)

        z = solve_step(z, eps, int(t), phi, psi, a, b)
    return z[0]


def check(model, work, rule, reference) -> None:
    """Every row of the engine ends where the plain loop does."""
    for i, row in enumerate(run(model, work, rule)):
        wanted = climb(model, work, i, reference)
        torch.testing.assert_close(row["noise"], wanted, rtol=1e-3, atol=1e-4)
