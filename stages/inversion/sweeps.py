"""Inversion of samplers whose steps hang together (PNDM, UniPC, DPM-Solver++ 2M, ...): sweeps from the picture up to
the noise, until the whole trajectory stands still (ours).

Each point x_n that the network was shown is an affine function of the picture's latent z_0 and of all outputs m_j
(`stages.models.multistep`): N equations x = T(m(x)). Above all the equation of x_n holds m_n itself and the outputs at
cleaner points, which are known when one climbs; through the sampler's history it also holds outputs at noisier points,
which are not known yet. So the equations are solved one by one, as those of a one-step sampler, by the same rules, and
again:

* In the first sweep the outputs that are not known yet are taken from the line through the last two, m_n being one of
  them, which leaves an equation in m_n alone.
* In every later one they are those of the sweep before, moved by as much as m_n moves: neighbours move together, and
  the outputs of a multistep sampler have weights of both signs that are large by themselves (PNDM: 55/24, -59/24, ...)
  and contract together. A point that would move by less than the tolerance is not evaluated again.
* Once no point would move by more, the row is done. Its seed is what the sampler would have to start from to meet these
  outputs.

Legend as in `stages.inversion.engine`; N evaluations of the network a picture, index 0 next to the picture.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.contract import Row
from stages.engine.slots import per_row
from stages.inversion.engine import Evaluation, Rule, State, Walk
from stages.models.latent import Predict
from stages.models.multistep import Multistep
from stages.models.schedule import Step

SWEEPS = 12
"""Most sweeps of a row."""


class SweepProblem(Walk[State]):
    """The walk of a sampler whose points depend on outputs at noisier ones.

    A row leaves with `residual` (N,): |T(m)_n - x_n| / |x_n|, all at or below the rule's tolerance; one that does not
    get there in `SWEEPS` sweeps has failed.

    Args:
        sampler: The affine map.
        rule: One with a tolerance.
        options: Of `Walk`.
    """

    def __init__(self, predict: Predict, sampler: Multistep, rule: Rule[State], **options: Any) -> None:
        if not rule.tolerance:
            raise ValueError("sweeps end where no point moves by more than a tolerance, and this rule has none")
        self.tolerance = rule.tolerance
        self.sampler = sampler = sampler.to(options.get("device", "cpu"))
        ahead_NN = sampler.coupling_NN.triu(1)
        self.own_N = sampler.coupling_NN.diagonal() + ahead_NN.sum(1)
        self.others_NN = sampler.coupling_NN - self.own_N.diag()
        # The first sweep: m_j = m_n + (j - n) (m_n - m_(n-1)) for the noisier j; constant for n = 0.
        N = len(sampler)
        index_N = torch.arange(N, device=ahead_NN.device)
        distance_NN = (index_N[None] - index_N[:, None]).clamp(min=0) * (index_N[:, None] > 0)
        carried_N = (ahead_NN * distance_NN).sum(1)
        self.first_own_N = self.own_N + carried_N
        self.first_others_NN = sampler.coupling_NN.tril(-1) - carried_N[1:].diag(-1)
        super().__init__(predict, sampler.t_S, rule, **options)

    def resize(self, slots: int) -> None:
        super().resize(slots)
        self.z_0_BCHW = torch.zeros_like(self.x_BCHW)
        self.m_BNCHW = torch.zeros((slots, len(self.sampler), *self.latent_shape), device=self.device)
        self.shown_BNCHW = torch.zeros_like(self.m_BNCHW)
        self.sweep_B = torch.zeros_like(self.k_B)

    def start(self, where: torch.Tensor, z_0_BCHW: torch.Tensor) -> None:
        self.z_0_BCHW[where] = z_0_BCHW
        self.m_BNCHW[where] = 0
        self.sweep_B[where] = 0

    def equation(self) -> Step:
        own_B = torch.where(self.sweep_B == 0, self.first_own_N[self.k_B], self.own_N[self.k_B])
        weight = -per_row(own_B, self.x_BCHW)
        one = torch.ones_like(weight)
        return Step(self.t_S[self.k_B], scale=one, weight=weight, back_scale=one, back_weight=-weight)

    def enter(self, enter_B: torch.Tensor) -> None:
        first_B = self.sweep_B == 0
        others_BN = torch.where(first_B[:, None], self.first_others_NN[self.k_B], self.others_NN[self.k_B])
        prev_BCHW = per_row(self.sampler.picture_N[self.k_B], self.z_0_BCHW) * self.z_0_BCHW + torch.einsum(
            "bn,bnchw->bchw", others_BN, self.m_BNCHW
        )
        self.prev_BCHW = torch.where(per_row(enter_B, prev_BCHW), prev_BCHW, self.prev_BCHW)
        super().enter(enter_B)
        # From the second sweep on the last output is a better start than any rule's.
        own_BCHW = self.m_BNCHW[self.all_B, self.k_B]
        again_B = per_row(enter_B & ~first_B, own_BCHW)
        self.x_BCHW = torch.where(again_B, self.equation().up(self.prev_BCHW, own_BCHW), self.x_BCHW)

    def advance(self, moved_B: torch.Tensor, point: Evaluation, z_BCHW: torch.Tensor) -> torch.Tensor:
        if not bool(moved_B.any()):
            return moved_B
        rows = moved_B.nonzero().flatten()
        k_R, last = self.k_B[rows], len(self.sampler) - 1
        self.m_BNCHW[rows, k_R] = point.m_BCHW[rows]
        self.shown_BNCHW[rows, k_R] = point.x_BCHW[rows]
        shown_RNCHW = self.shown_BNCHW[rows]
        drift_RNCHW = self.sampler.points(self.z_0_BCHW[rows], self.m_BNCHW[rows]) - shown_RNCHW
        drift_RN = drift_RNCHW.flatten(2).norm(dim=2) / shown_RNCHW.flatten(2).norm(dim=2).clamp(min=1e-12)
        first_R = (self.sweep_B[rows] == 0) & (k_R < last)
        open_RN = drift_RN > self.tolerance
        above_RN = open_RN & (torch.arange(last + 1, device=self.device) > k_R[:, None])
        turning_R = ~first_R & ~above_RN.any(1)
        sweep_R = self.sweep_B[rows] + turning_R
        over_R = turning_R & (~open_RN.any(1) | (sweep_R >= SWEEPS))
        # argmax of booleans is the first one that holds.
        next_R = torch.where(turning_R, open_RN.int().argmax(1), above_RN.int().argmax(1))
        next_R = torch.where(first_R, k_R + 1, next_R)
        self.residual_BS[rows] = drift_RN
        self.sweep_B[rows] = sweep_R
        self.k_B[rows] = torch.where(over_R, k_R, next_R)
        finished_B = torch.zeros_like(moved_B)
        finished_B[rows] = over_R
        self.enter(moved_B & ~finished_B)
        return finished_B

    def outputs(self, slot: int) -> Row:
        seed_BCHW = self.sampler.seed(self.z_0_BCHW[slot : slot + 1], self.m_BNCHW[slot : slot + 1])
        return {"noise": seed_BCHW[0].to("cpu", copy=True)}

    def failure(self, slot: int) -> str | None:
        worst, k = self.residual_BS[slot].max(0)
        if bool(self.broken_B[slot]) or float(worst) <= self.tolerance:
            return super().failure(slot)
        return (
            f"inversion does not settle: after {SWEEPS} sweeps the point at time {self.t_S[int(k)].item():g} still "
            f"moves by {float(worst):.1e} of its length: lower the guidance, take more steps, or leave `sampler` out"
        )
