"""How often the host waits for the device in a step of `lbo`, and how many operations a step of each method is, beside
the network: counted on the CPU, with a small network in the place of the U-Net, 64 rows of 50 steps in 16 slots, which
end at different times. Prints two tables, and writes benchmarks/inversion/results/looks.json.

    python -m benchmarks.inversion.looks
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.instruments import HostReads
from benchmarks.inversion.table import RESULTS
from stages.engine.solver import Occupancy, solve
from stages.inversion.engine import InversionProblem
from stages.inversion.lbo import LatentBias
from stages.inversion.settings import (
    DdimMethod,
    EulerMethod,
    ExactMethod,
    FireFlowMethod,
    FixedPointMethod,
    InversionMethod,
    LboMethod,
    NewtonMethod,
    RenoiseMethod,
    RfSolverMethod,
    UniInvMethod,
)
from stages.models.flow_schedule import flow_schedule
from stages.models.schedule import ddim_schedule

SHAPE, ROWS, SLOTS, STEPS = (2, 4, 4), 64, 16, 50
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
          "steps_offset": 1}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, whatever the device makes of it; and how much of it computes, which views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count, self.computing = self.count + 1, self.computing + (not func.is_view)
        return func(*args, **(kwargs or {}))


class Watched(InversionProblem):  # type: ignore[type-arg]
    """Leaves out what loading and unloading read."""

    reads: HostReads
    aside = Counter[str]()

    def load(self, *given: Any) -> None:
        before = self.reads.counts.copy()
        super().load(*given)
        self.aside += self.reads.counts - before

    def unload(self, slots: Any) -> Any:
        before = self.reads.counts.copy()
        rows = super().unload(slots)
        self.aside += self.reads.counts - before
        return rows


def network(strength: float) -> Any:
    count = 2 * 4 * 4
    mixing = torch.randn((count, count), generator=torch.Generator().manual_seed(3)) * strength / count**0.5

    def predict(z: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tanh(z.flatten(1) @ mixing + condition["c"] + t.float()[:, None] / 1000).view_as(z)

    return predict


def rows(count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(4)
    z, c = torch.randn((count, *SHAPE), generator=draw), torch.randn((count, 32), generator=draw) * 0.3
    return [{"id": str(i), "z": z[i], "condition": {"c": c[i]}} for i in range(count)]


def counted(strength: float) -> dict[str, float]:
    schedule, occupancy = ddim_schedule(CONFIG, STEPS), Occupancy()
    rule = LatentBias(passes=40, tolerance=1e-5)
    problem = Watched(network(strength), schedule, rule, slots=SLOTS, latent_shape=SHAPE)
    problem.reads, problem.aside = HostReads(), Counter()
    with problem.reads:
        done = list(solve(problem, rows(ROWS), occupancy=occupancy))
    waits = (problem.reads.counts - problem.aside).total()
    return {
        "strength": strength, "waits_a_step": waits / occupancy.steps, "steps": occupancy.steps,
        "rows_a_step": ROWS / occupancy.steps, "forwards": sum(row["forwards"] for row in done),
    }  # fmt: skip


def operations(method: InversionMethod) -> dict[str, Any]:
    """Of a step in the midst of its steps, beside the network's."""
    flow = "diffusion" not in method.inverts
    schedule = flow_schedule(FLOW, STEPS) if flow else ddim_schedule(CONFIG, STEPS)
    one = InversionProblem(network(0.8), schedule, method.rule(1.0), slots=SLOTS, latent_shape=SHAPE)
    one.load(list(range(SLOTS)), rows(SLOTS))
    one.step()
    one.step()
    with Operations() as step:
        one.step()
    with torch.no_grad(), Operations() as networks:
        one.predict(one.x_BCHW, one.k_B, one.condition)
    return {"method": method.label, "family": "flow" if flow else "diffusion",
            "operations": step.count - networks.count, "computing": step.computing - networks.computing}  # fmt: skip


METHODS: tuple[InversionMethod, ...] = (
    DdimMethod(), UniInvMethod(), FixedPointMethod(), FixedPointMethod(name="anderson", acceleration="anderson"),
    RenoiseMethod(), NewtonMethod(), ExactMethod(), LboMethod(), EulerMethod(), RfSolverMethod(), FireFlowMethod(),
)  # fmt: skip


def main() -> None:
    found = [counted(strength) for strength in (0.8, 6.0)]
    print("| network | waits a step | rows out a step | passes |\n|---|---|---|---|")
    for one in found:
        name = "expanding" if one["strength"] > 1 else "easy"
        print(f"| {name} | {one['waits_a_step']:.2f} | {one['rows_a_step']:.2f} | {one['forwards']:.0f} |")
    spent = [operations(method) for method in METHODS]
    print("\n| method | model | operations a step | of these compute |\n|---|---|---|---|")
    for line in spent:
        print(f"| {line['method']} | {line['family']} | {line['operations']} | {line['computing']} |")
    (RESULTS / "looks.json").write_text(json.dumps({"waits": found, "operations": spent}, indent=1) + "\n")


if __name__ == "__main__":
    main()
