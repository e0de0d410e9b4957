"""OVI: the CLIP image embedding of a prompt, found by optimising visual tokens through the frozen image encoder.

After "Training-Free Diffusion Priors for Text-to-Image Generation via Optimization-based Visual Inversion" (Dell'Erba
and Bagdanov, arXiv 2511.20821); the base algorithm is the one of "Cross the Gap" (Mistretta et al., ICLR 2025). The
formulas and weights of the two constraints, `direct`, `compact` tokens, warm starts and the stopping rules are ours.

Legend: B slots (b: some of them), K neighbours, E embedding width; `x_B...` the variable, tokens or embedding;
`z_BE` image embedding, not normalised; `t_BE` text embedding of unit norm; `active_B`, `done_B`, `which_B` are boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, normalize

from pipeline.contract import Row, failed, ok
from stages.engine.adamw import RowAdamW
from stages.engine.device import free_bytes, sent
from stages.engine.gradients import FLOAT16_SCALE, RowGradient
from stages.engine.randomness import row_normal
from stages.engine.slots import held, slot_mask
from stages.engine.solver import capture
from stages.engine.stopping import REASONS, StoppingRule
from stages.models.compiled import check_compiler
from stages.models.memory import power_of_two, rows_in
from stages.models.vision_tower import VisionTower
from stages.ovi.constraints import Search, Whitening
from stages.ovi.settings import OVI, Direct

CPU_SLOTS = 32


@dataclass(frozen=True)
class Parametrization:
    """Where the variable of a row lives, and how it becomes an embedding.

    Attributes:
        shape: The variable's shape without B.
        encode: variable (B, *shape) -> z_BE.
        width: E.
        device: Where the encoder lives.
        passes: Encoder passes (forward and backward) that one step costs a row: 1, or 0 without an encoder.
        centred: The row's centre (`Whitening.centres`) is to be added.
        slots: Rows at once, where the method names no number.
        light: A GPU would do a step's arithmetic faster than the host can launch it.
    """

    shape: tuple[int, ...]
    encode: Callable[[torch.Tensor], torch.Tensor]
    width: int
    device: torch.device
    passes: int
    centred: bool = False
    slots: Callable[[], int] = lambda: CPU_SLOTS
    light: bool = False

    @staticmethod
    def tokens(tower: VisionTower) -> Parametrization:
        """Pseudo-tokens (P, D), embedded by the image encoder: OVI's."""
        shape, device = (tower.tokens, tower.width), tower.positions_ND.device

        def slots() -> int:
            free = free_bytes(device)
            return CPU_SLOTS if free is None else power_of_two(rows_in(free, tower.row_bytes()))

        return Parametrization(shape, tower, tower.embedding_width, device, 1, slots=slots, light=tower.compact)

    @staticmethod
    def direct(whitening: Whitening) -> Parametrization:
        """The embedding itself, in whitened coordinates u: z = centre + L u (ours). Starts near the centre."""
        cholesky_EE = whitening.cholesky_EE
        width, device = len(cholesky_EE), cholesky_EE.device
        return Parametrization((width,), lambda u_BE: u_BE @ cholesky_EE.mT, width, device, 0, centred=True, light=True)


def stopping_rule(method: OVI | Direct) -> StoppingRule:
    """The engine's rule: it watches a value that falls, so a target cosine becomes a distance."""
    stop = method.stopping
    absolute = stop.target
    if absolute is not None and stop.watch == "cosine":
        absolute = 1 - absolute
    return StoppingRule(method.limit, absolute, stop.relative, stop.patience, stop.minimum)


class OviProblem:
    """The `Problem` of OVI: minimise (1 - cos(z, t)) + lambda_m R_m(z) + lambda_n R_n(z) over each row's variable.

    R_m is the squared Mahalanobis distance over E, R_n one minus the mean cosine to the bank's k nearest embeddings.
    Rows carry `text` (E,), the text embedding, and may carry `start`, the first value of the variable; the others start
    from N(0, init_std^2) drawn from (seed, id). A row comes back with `embedding`, `text_cosine`, `mahalanobis`,
    `neighbour_cosine`, `loss`, `steps`, `passes`, `stopped`, and `variable`.

    Args:
        parametrization: The variable and its encoder.
        method: AdamW, constraint, stopping.
        seed: The job's seed.
        whitening: Needed by `direct`, by the Mahalanobis constraint and by `watch: mahalanobis`; else only reported.
        search: Needed by the neighbour constraint.

    Raises:
        ValueError: A constraint lacks what it needs; or the encoder is to be compiled and cannot be.
    """

    def __init__(
        self, parametrization: Parametrization, method: OVI | Direct, *, seed: int = 0,
        whitening: Whitening | None = None, search: Search | None = None,
    ) -> None:  # fmt: skip
        self.constraint, self.stopping = method.constraint, method.stopping
        asked = self.constraint.mahalanobis or self.stopping.watch == "mahalanobis" or parametrization.centred
        if whitening is None and asked:
            raise ValueError("the Mahalanobis distance needs a reference with statistics of image embeddings")
        if search is None and self.constraint.neighbours:
            raise ValueError("the neighbour constraint needs a reference with an index")
        if method.accelerate == "compile":
            check_compiler(parametrization.device)
        self.parametrization, self.method, self.seed = parametrization, method, seed
        self.whitening, self.search = whitening, search if self.constraint.neighbours else None
        self.resize(method.slots or parametrization.slots())

    def resize(self, slots: int) -> None:
        """Allocate the state of `slots` rows; rows in flight are forgotten."""
        method, device, width = self.method, self.parametrization.device, self.parametrization.width
        self.slots = slots
        self.rows: list[Row | None] = [None] * slots
        self.x_B = torch.zeros(slots, *self.parametrization.shape, device=device)
        self.t_BE = torch.zeros(slots, width, device=device)
        self.near_BKE = torch.zeros(slots, self.constraint.k if self.search else 0, width, device=device)
        self.z_BE = torch.zeros(slots, width, device=device)
        self.centre_BE = torch.zeros(slots, width, device=device)
        self.weight_B = torch.full((slots,), self.constraint.mahalanobis, device=device)
        self.report_B4 = torch.zeros(slots, 4, device=device)  # loss, cosine, mahalanobis, neighbour cosine
        self.active_B = torch.zeros(slots, dtype=torch.bool, device=device)
        self.gradient = RowGradient(slots, FLOAT16_SCALE if method.precision == "float16" else None, device)
        self.adam = RowAdamW(self.x_B, method.lr, eps=method.eps, weight_decay=method.weight_decay)
        # The start is evaluated too, before the first update.
        rule = stopping_rule(method)
        self.stopper = replace(rule, limit=rule.limit + 1, minimum=rule.minimum + 1).start(slots, device)
        self._encoder = self.parametrization.encode
        if method.accelerate == "compile":
            self._encoder = torch.compile(self._encoder, dynamic=False)
        searches = self.search is not None and self.constraint.interval and not self.search.on_device
        if method.accelerate == "graph" and searches:
            raise ValueError("`accelerate: graph` needs the bank in device memory, or `interval: 0`")
        unasked = method.accelerate == "none" and self.parametrization.light and device.type == "cuda" and not searches
        self.recorded = method.accelerate == "graph" or unasked
        self._advance: Callable[[], None] | None = None if self.recorded else self._evaluate_and_update

    def forget(self, most: int) -> None:
        """All slots are empty; there are so many at most."""
        if most < self.slots:
            return self.resize(most)
        self.rows = [None] * self.slots
        self.active_B.zero_()

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        if self._advance is None:  # here, where the solver halves what does not fit
            self._advance = capture(self._evaluate_and_update)
        device, shape = self.parametrization.device, self.parametrization.shape
        which_B = slot_mask(self.slots, slots, device)
        index_b = sent(slots, device)
        text_bE = torch.stack([torch.as_tensor(row["text"], dtype=torch.float32) for row in rows]).to(device)
        start_b = row_normal(shape, self.seed, [row["id"] for row in rows], "tokens") * self.method.init_std
        for i, row in enumerate(rows):
            self.rows[slots[i]] = row
            if row.get("start") is not None:
                start_b[i] = torch.tensor(row["start"], dtype=torch.float32).view(shape)
        self.x_B[index_b] = start_b.to(device)
        self.t_BE[index_b] = normalize(text_bE, dim=-1)
        if self.whitening is not None:
            self.centre_BE[index_b] = self.whitening.centres(text_bE)
        if self.whitening is not None and self.constraint.units == "balanced":
            scale_b = self.whitening.balance(self.t_BE[index_b], self.centre_BE[index_b])
            self.weight_B[index_b] = self.constraint.mahalanobis * scale_b
        if self.search is not None and self.constraint.interval == 0:
            self.near_BKE[index_b] = self.search(text_bE)
        self.gradient.reset(which_B)
        self.adam.reset(which_B)
        self.stopper.reset(which_B)
        self.active_B |= which_B

    def step(self) -> torch.Tensor:
        assert self._advance is not None
        self._advance()
        return ~self.active_B

    def _evaluate_and_update(self) -> None:
        """One step of every slot: evaluate the variable as it is, then, unless the row stops, update it."""
        with torch.enable_grad():
            x_B = self.x_B.detach().requires_grad_()
            z_BE = self._encode(x_B)
            if self.search is not None and self.constraint.interval:
                self._search_again(z_BE.detach())
            loss_B, cosine_B, mahalanobis_B, near_B = self._objective(z_BE)
            grad_B, skip_B = self.gradient(loss_B, x_B, self.active_B)
        with torch.no_grad():
            watched_B = {"loss": loss_B, "cosine": 1 - cosine_B, "mahalanobis": mahalanobis_B}[self.stopping.watch]
            was_B = self.active_B.clone()
            done_B = self.stopper.update(watched_B, was_B)
            kept_B = was_B & self.stopper.improved_B if self.stopping.best else was_B
            report_B4 = torch.stack([loss_B, cosine_B, mahalanobis_B, near_B], dim=1)
            self.z_BE.copy_(torch.where(kept_B[:, None], z_BE, self.z_BE))
            self.report_B4.copy_(torch.where(kept_B[:, None], report_B4, self.report_B4))
            self.active_B.copy_(was_B & ~done_B)
            self.adam.step(grad_B, self.active_B & ~skip_B)

    def _encode(self, x_B: torch.Tensor) -> torch.Tensor:
        """z_BE; zero in empty slots, which the encoder is not shown unless it was compiled or recorded for all."""
        for_all = self.recorded or self.method.accelerate == "compile"
        which = None if for_all else held(self.rows, x_B.device)
        if which is None:
            z_BE = self._encode_all(x_B)
        else:
            z_bE = self._encode_all(x_B[which])
            z_BE = z_bE.new_zeros(self.slots, self.parametrization.width).index_copy(0, which, z_bE)
        return z_BE + self.centre_BE if self.parametrization.centred else z_BE

    def _encode_all(self, x_B: torch.Tensor) -> torch.Tensor:
        precision = self.method.precision
        context: Any = nullcontext()
        if precision != "float32":
            context = torch.autocast(self.parametrization.device.type, dtype=getattr(torch, precision))
        with context:
            return self._encoder(x_B).float()

    def _objective(self, z_BE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """loss_B, and what it is made of: cosine to the text, Mahalanobis distance over E, cosine to the neighbours."""
        cosine_B = cosine_similarity(z_BE, self.t_BE, dim=-1)
        loss_B = 1 - cosine_B
        mahalanobis_B = near_B = torch.zeros_like(cosine_B)
        if self.whitening is not None:
            mahalanobis_B = self.whitening.distance(z_BE, self.centre_BE)
        if self.constraint.mahalanobis:
            loss_B = loss_B + self.weight_B * mahalanobis_B
        if self.search is not None:
            near_B = cosine_similarity(z_BE[:, None], self.near_BKE, dim=-1).mean(1)
            loss_B = loss_B + self.constraint.neighbours * (1 - near_B)
        return loss_B, cosine_B, mahalanobis_B, near_B

    @torch.no_grad()
    def _search_again(self, z_BE: torch.Tensor) -> None:
        """Where a row's interval is over, and for those rows alone; all of them in a graph, which keeps the shapes."""
        assert self.search is not None
        due_B = self.active_B & (self.stopper.steps_B % self.constraint.interval == 0)
        if self.recorded:
            self.near_BKE.copy_(torch.where(due_B[:, None, None], self.search(z_BE), self.near_BKE))
        elif (due_b := due_B.nonzero().flatten()).numel():
            self.near_BKE[due_b] = self.search(z_BE[due_b])

    def unload(self, slots: Sequence[int]) -> list[Row]:
        index_b = sent(slots, self.parametrization.device)
        z_bE, report_b4, x_b = self.z_BE[index_b].cpu(), self.report_B4[index_b].cpu(), self.x_B[index_b].cpu()
        evaluations_b = self.stopper.steps_B[index_b].tolist()
        reasons_b = self.stopper.reason_B[index_b].tolist()
        out = []
        for i, slot in enumerate(slots):
            row = self.rows[slot]
            assert row is not None
            self.rows[slot] = None
            if REASONS[reasons_b[i]] == "diverged" or not z_bE[i].isfinite().all():
                where = f"the optimisation diverged after {evaluations_b[i] - 1} steps"
                out.append(failed(row, f"{where}: lower `lr` or the weights of the constraints"))
                continue
            loss, cosine, mahalanobis, near = report_b4[i].tolist()
            out.append(
                ok(
                    row, embedding=z_bE[i].numpy(), text_cosine=cosine, loss=loss, steps=evaluations_b[i] - 1,
                    mahalanobis=mahalanobis if self.whitening is not None else None,
                    neighbour_cosine=near if self.search is not None else None,
                    passes=evaluations_b[i] * self.parametrization.passes, stopped=REASONS[reasons_b[i]],
                    variable=x_b[i].numpy(),
                )
            )  # fmt: skip
        return out
