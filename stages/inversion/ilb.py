"""Image Latent Boosting: move the image latent itself, so that what is inverted also decodes to the picture.

The idea is of Chen et al., 2026 (see `stages.inversion.lbo`): the image latent, the interface between diffusion and
autoencoder, is adjusted so that inversion and reconstruction are optimised together.

* decoder: min over z_0 of |Dec(z_0) - x|^2, started at the encoder's latent. This is the decoder inversion of Hong et
  al., "On Exact Inversion of DPM-Solvers" (CVPR 2024): loss, optimiser (Adam) and rate (.1, a linear rise, then a
  cosine) are those of their code, which makes 100 updates, 10 of them in the rise, from a sample of the posterior.
  Ours: half as many, from the posterior's mean; many rows in a batch, each with a rate of its own.
* joint (ours): every few updates z_0 is inverted and generated again, zhat = Gen(Inv(z_0)), and the updates between
  minimise |Dec(z_0 + stopgrad(zhat - z_0)) - x|^2: the round trip's own error is in the loss.

Legend: B slots; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from pipeline.contract import Row, failed
from stages.engine.adamw import RowAdamW
from stages.engine.device import sent
from stages.engine.gradients import RowGradient
from stages.engine.room import Room
from stages.engine.slots import held, per_row
from stages.engine.solver import solve
from stages.engine.stopping import DIVERGED, StoppingRule


def cosine_rate(rate: float, steps: int, warmup: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A learning rate that rises linearly over `warmup` steps and falls to zero at `steps` along a cosine."""

    def lr(steps_B: torch.Tensor) -> torch.Tensor:
        made_B = steps_B.double()
        falling_B = ((made_B - warmup) / max(steps - warmup, 1)).clamp(0, 1)
        return rate * torch.minimum((made_B + 1) / (warmup + 1), (1 + torch.cos(math.pi * falling_B)) / 2)

    return lr


class BoostProblem:
    """Adam on each row's image latent through the frozen decoder. A `stages.engine.solver.Problem`.

    Rows come with `x` (3, H, W) and `z`; optionally `offset`, added to z before decoding, and, from an earlier visit,
    `decodes` and `boost`, the state of optimiser and loss scale. They leave with a new `z`, `boost`, and `decodes`, the
    decoder passes spent (a gradient counts as two more).

    Args:
        decode: Latents to pictures.
        size: Width and height of the pictures, in pixels.
        steps: Updates of a row in all; the rate's cosine ends there.
        visit: Updates before a row leaves; all when None.
        scale: `RowGradient`'s; a row whose gradient overflows loses that update.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], torch.Tensor],
        *,
        slots: int,
        latent_shape: tuple[int, int, int],
        size: tuple[int, int],
        steps: int = 100,
        visit: int | None = None,
        rate: float = 0.1,
        warmup: int = 10,
        scale: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scale = scale
        self.decode, self.device = decode, torch.device(device)
        self.latent_shape, self.size = latent_shape, size
        self.rule = StoppingRule(limit=min(visit or steps, steps))
        self.lr = cosine_rate(rate, steps, warmup)
        self.resize(slots)

    def resize(self, slots: int) -> None:
        self.slots = slots
        self.rows: list[Row | None] = [None] * slots
        self.z_BCHW = torch.zeros((slots, *self.latent_shape), device=self.device)
        self.offset_BCHW = torch.zeros_like(self.z_BCHW)
        self.x_BCHW = torch.zeros((slots, 3, self.size[1], self.size[0]), device=self.device)
        self.gradient = RowGradient(slots, self.scale, self.device)
        self.optimiser = RowAdamW(self.z_BCHW, self.lr, weight_decay=0.0)
        self.stopper = self.rule.start(slots, self.device)
        self.active_B = torch.zeros(slots, dtype=torch.bool, device=self.device)

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        self.gradient.reset(slots)
        self.optimiser.reset(slots)
        self.stopper.reset(slots)
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
            self.z_BCHW[slot] = row["z"].to(self.device)
            self.x_BCHW[slot] = row["x"].to(self.device)
            self.offset_BCHW[slot] = row["offset"].to(self.device) if "offset" in row else 0.0
            if "boost" in row:
                first, second, steps, scale = row["boost"]
                self.optimiser.first[slot], self.optimiser.second[slot] = first.to(self.device), second.to(self.device)
                self.optimiser.steps_B[slot], self.gradient.scale_B[slot] = steps, scale
        self.active_B[sent(slots, self.device)] = True

    def step(self) -> torch.Tensor:
        with torch.enable_grad():
            z_BCHW = self.z_BCHW.detach().clone().requires_grad_(True)
            loss_B = self._errors(z_BCHW)
            gradient_BCHW, skip_B = self.gradient(loss_B, z_BCHW, self.active_B)
        gradient_BCHW = torch.where(per_row(self.active_B, gradient_BCHW), gradient_BCHW, 0.0)
        self.optimiser.step(gradient_BCHW, self.active_B & ~skip_B)
        done_B = self.stopper.update(loss_B, self.active_B)
        self.active_B = self.active_B & ~done_B
        return done_B

    def _errors(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """loss_B, the mean squared error of what z decodes to; zero in empty slots."""
        which = held(self.rows, self.device)
        some = slice(None) if which is None else which
        error = self.decode(z_BCHW[some] + self.offset_BCHW[some]) - self.x_BCHW[some]
        loss_b = error.flatten(1).square().mean(1)
        return loss_b if which is None else loss_b.new_zeros(self.slots).index_copy(0, which, loss_b)

    def unload(self, slots: Sequence[int]) -> list[Row]:
        rows = []
        for slot in slots:
            row = self.rows[slot]
            assert row is not None
            self.rows[slot] = None
            moments = (self.optimiser.first, self.optimiser.second)
            counts = int(self.optimiser.steps_B[slot]), float(self.gradient.scale_B[slot])
            boost = (*(moment[slot].to("cpu", copy=True) for moment in moments), *counts)
            if int(self.stopper.reason_B[slot]) == DIVERGED:
                row = failed(row, "boosting diverged: no finite picture; lower ilb's rate, or take dtype float32")
            decodes = row.get("decodes", 0) + 3 * int(self.stopper.steps_B[slot])
            rows.append({**row, "z": self.z_BCHW[slot].to("cpu", copy=True), "boost": boost, "decodes": decodes})
        self.active_B[sent(slots, self.device)] = False
        return rows


def boost_decoder(
    make: Callable[[int | None], BoostProblem], rows: Iterable[Row], room: Room | None = None
) -> Iterator[Row]:
    """`ilb: decoder`: all updates in one visit."""
    return solve(make(None), rows, room=room)


def boost_joint(
    make: Callable[[int | None], BoostProblem],
    round_trip: Callable[[Iterable[Row]], Iterator[Row]],
    rows: Iterable[Row],
    *,
    steps: int,
    every: int,
    room: Room | None = None,
) -> Iterator[Row]:
    """`ilb: joint`: a round trip, then `every` updates around its error, until `iterations` are made.

    Args:
        make: A problem for visits of so many updates.
        round_trip: Rows with `z` to rows with `regenerated` = Gen(Inv(z)); counts its own passes.
    """
    for _ in range(math.ceil(steps / every)):
        rows = solve(make(every), _offsets(round_trip(rows)), room=room)
    yield from rows


def _offsets(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        yield {**row, "offset": row["regenerated"] - row["z"]} if row.get("status") != "failed" else row
