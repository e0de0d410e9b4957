"""From latents to noise and back, by any method: what a stage does with a method's rule and with its extra state.

A picture whose method has no extra state comes back from its noise by the model's sampler. The others need what they
left beside it, in a row's column of that name: their `Scheme` makes it on the way up and uses it on the way down.

Legend: B rows; `z_BCHW` latents; S steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from pipeline.contract import Row, failed
from stages.engine.gradients import loss_scale
from stages.engine.passthrough import in_batches
from stages.engine.randomness import row_normal
from stages.engine.solver import Occupancy, solve
from stages.inversion import pairs
from stages.inversion.engine import InversionProblem, Walk
from stages.inversion.lbo import replay_bias
from stages.inversion.null_text import generate_null_text, learn_null_text
from stages.inversion.rf_inversion import steered_down, steered_up
from stages.inversion.settings import EdictMethod, InversionMethod, LboMethod, NullTextMethod, RfInversionMethod
from stages.inversion.sweeps import SweepProblem
from stages.models.latent import Condition, Geometry, LatentModel
from stages.models.multistep import Multistep
from stages.models.sampler import sample
from stages.models.schedule import Schedule

Plan = TypeVar("Plan", bound=Schedule | Multistep)


class Scheme(Generic[Plan]):
    """A method without extra state: up by its rule, down by the model's sampler.

    Attributes:
        guided: Conditions need their negative side.
        keep_path: Rows leave the solver with every z_t.
        keep_shown: They leave it with what the network was shown beside them.
        recorded: Steps go as CUDA graphs, where the method's rows walk up the schedule in slots.
    """

    keep_path = False
    keep_shown = False
    recorded = False

    def __init__(self, method: InversionMethod, model: LatentModel, schedule: Plan, *, guidance: float) -> None:
        self.method, self.model, self.schedule, self.guidance = method, model, schedule, guidance
        self.guided = guidance > 1
        self.predict = model.predictor(guidance)

    @property
    def precision(self) -> tuple[float, float]:
        """The guidance that magnifies what a step leaves over, and the spacing of the network's numbers at 1."""
        # Told to the network, guidance magnifies nothing: what comes out is one output, as good as the network is.
        magnified = self.guidance if self.model.geometry.guiding == "classifier-free" else 1.0
        return magnified, torch.finfo(self.dtype).eps

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's."""
        return self.model.dtypes[next(iter(self.model.geometry.parts))]

    def problem(self, slots: int) -> Walk[Any]:
        """The walk of `slots` rows up the schedule."""
        guidance, eps = self.precision
        rule = self.method.rule(guidance, eps)
        options: dict[str, Any] = {
            "slots": slots, "device": self.model.device, "latent_shape": self.model.geometry.latent_shape,
        }
        if isinstance(self.schedule, Multistep):
            return SweepProblem(self.predict, self.schedule, rule, **options)
        options |= {"keep_path": self.keep_path, "keep_shown": self.keep_shown, "recorded": self.recorded}
        return InversionProblem(self.predict, self.schedule, rule, noise=eps / 2, **options)

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        """Rows with `z` and `condition` to rows with `noise` (z_T), `forwards`, the extra state, `residual` where there
        is one, and `backwards` where gradients were taken. Failed rows pass."""
        room = self.model.rooms["slots"]
        return solve(self.problem(min(slots, room.rows)), rows, occupancy=occupancy, room=room)

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        """z_0 from the noise and, where the method has it, the extra state (B, ...)."""
        return sample(self.predict, self.schedule, noise_BCHW, condition)

    def retries(self) -> Iterator[Scheme[Plan]]:
        """Stricter ones, for rows that do not come back; none unless the method asks for them."""
        if isinstance(self.method, LboMethod):
            for times in range(1, 1 + (self.method.retries or 0)):
                stricter = self.method.tightened(times, *self.precision)
                scheme = Scheme(stricter, self.model, self.schedule, guidance=self.guidance)
                scheme.keep_path, scheme.recorded = self.keep_path, self.recorded
                yield scheme


class Replay(Scheme[Schedule]):
    """LBO whose remaining biases are stored, and added to each step's result in generation."""

    keep_path = True

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        return in_batches(super().invert(rows, slots, occupancy), slots, self._with_bias)

    def _with_bias(self, rows: Sequence[Row]) -> Iterator[Row]:
        path_BSCHW = stacked(rows, "path", self.model.device)
        bias_BSCHW = replay_bias(self.predict, self.schedule, path_BSCHW, conditions(rows, self.model.device))
        for row, own in zip(rows, bias_BSCHW, strict=True):
            yield {**row, "bias": own.cpu(), "forwards": row["forwards"] + len(self.schedule)}

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        return sample(self.predict, self.schedule, noise_BCHW, condition, extra_B)


class ReplayShown(Scheme[Schedule]):
    """LBO whose network is shown in generation what it was shown last in inversion (as in DirectEdit, Yang et al.,
    2026, for Euler's method): stored for no pass of its own, and exact however few passes were made."""

    keep_shown = True

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        return sample(self.predict, self.schedule, noise_BCHW, condition, input_bias_BSCHW=extra_B)


class NullText(Scheme[Schedule]):
    """Null-text inversion: the pivot is inverted without guidance, and generation is guided by what was learned."""

    keep_path = True

    def __init__(self, method: NullTextMethod, model: LatentModel, schedule: Schedule) -> None:
        super().__init__(method, model, schedule, guidance=1.0)
        self.settings, self.guided = method, True

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        return in_batches(super().invert(rows, slots, occupancy), slots, self._with_text)

    def _with_text(self, rows: Sequence[Row]) -> Iterator[Row]:
        for part in self.model.rooms["null-text"].parts(len(rows), lambda part: self._learned(rows[part])):
            yield from part

    def _learned(self, rows: Sequence[Row]) -> list[Row]:
        made = []
        learned = learn_null_text(
            self.predict, self.schedule, stacked(rows, "path", self.model.device),
            conditions(rows, self.model.device), guidance=self.settings.guidance, iterations=self.settings.iterations,
            scale=loss_scale(self.model.dtypes.values()),
        )  # fmt: skip
        for i, row in enumerate(rows):
            forwards, backwards = row["forwards"] + int(learned.forwards_B[i]), int(learned.backwards_B[i])
            text_SLE = learned.null_BSLE[i].cpu()
            made.append({**row, "null_text": text_SLE, "forwards": forwards, "backwards": backwards})
        return made

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        assert extra_B is not None
        return generate_null_text(
            self.predict, self.schedule, noise_BCHW, condition, extra_B, guidance=self.settings.guidance
        )


class ExactPair(Scheme[Schedule]):
    """BELM and EDICT: all rows in step, and a second latent."""

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        return in_batches(rows, slots, self._up)

    def _up(self, rows: Sequence[Row]) -> Iterator[Row]:
        z_BCHW, condition = stacked(rows, "z", self.model.device), conditions(rows, self.model.device)
        if isinstance(self.method, EdictMethod):
            pair, passes = pairs.edict_invert(self.predict, self.schedule, z_BCHW, condition, self.method.mixing), 2
        else:
            pair, passes = pairs.belm_invert(self.predict, self.schedule, z_BCHW, condition), 1
        for row, noise, second in zip(rows, *pair, strict=True):
            if not bool(noise.isfinite().all() & second.isfinite().all()):
                yield failed(row, f"{self.method.label} overflowed: an exact pair has no damping; use another method")
                continue
            forwards = passes * len(self.schedule)
            yield {**row, "noise": noise.cpu(), "latent_2": second.cpu(), "forwards": forwards}

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        assert extra_B is not None
        pair = (noise_BCHW, extra_B)
        if isinstance(self.method, EdictMethod):
            return pairs.edict_generate(self.predict, self.schedule, pair, condition, self.method.mixing)
        return pairs.belm_generate(self.predict, self.schedule, pair, condition)


class Steered(Scheme[Schedule]):
    """RF-Inversion: all rows in step, and the picture's latent."""

    def __init__(self, method: RfInversionMethod, model: LatentModel, schedule: Schedule, *, guidance: float) -> None:
        super().__init__(method, model, schedule, guidance=guidance)
        self.settings = method

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        return in_batches(rows, slots, self._up)

    def _up(self, rows: Sequence[Row]) -> Iterator[Row]:
        z_BCHW, condition = stacked(rows, "z", self.model.device), conditions(rows, self.model.device)
        y_BCHW = row_normal(z_BCHW.shape[1:], 0, [row["id"] for row in rows], "rf-inversion").to(z_BCHW.device)
        noise_BCHW = steered_up(self.predict, self.schedule, z_BCHW, condition, y_BCHW, self.settings.gamma)
        for row, noise in zip(rows, noise_BCHW, strict=True):
            yield {**row, "noise": noise.cpu(), "picture_latent": row["z"], "forwards": len(self.schedule)}

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        assert extra_B is not None
        steered = round(self.settings.steered * len(self.schedule))
        return steered_down(self.predict, self.schedule, noise_BCHW, condition, extra_B, self.settings.eta, steered)


def check_method(method: InversionMethod, geometry: Geometry, schedule: Schedule | Multistep) -> None:
    """Refuse a method that this model's equations are not made for.

    Raises:
        ValueError: It is one: of the other kind of model, or for a sampler whose steps are undone one by one.
    """
    kind = "diffusion" if geometry.grid is None else "flow"
    if kind not in method.inverts:
        what = "a rectified flow" if kind == "flow" else "a variance-preserving diffusion"
        instead = "euler, uni-inv or lbo" if kind == "flow" else "ddim, uni-inv or lbo"
        raise ValueError(
            f"method {method.label} does not invert {what}, which model {geometry.sizes.model!r} is: take {instead}"
        )
    if isinstance(method, NullTextMethod) and geometry.guiding != "classifier-free":
        raise ValueError(
            f"method {method.label} learns negative prompts, and model {geometry.sizes.model!r} is not guided by them: "
            "take uni-inv or lbo"
        )
    if isinstance(schedule, Multistep) and not method.sweeps:
        raise ValueError(
            f"method {method.label} undoes a sampler's steps one by one, and those of the model's sampler hang "
            "together: take method lbo, or fixed-point with a tolerance above 0, or leave `sampler` out"
        )


def scheme_of(method: InversionMethod, model: LatentModel, *, steps: int, guidance: float) -> Scheme[Any]:
    """How a method takes this model's latents to noise and back.

    Raises:
        ValueError: It does not.
    """
    schedule = model.schedule(steps)
    check_method(method, model.geometry, schedule)
    if isinstance(schedule, Multistep):
        return Scheme(method, model, schedule, guidance=guidance)
    if isinstance(method, NullTextMethod):
        return NullText(method, model, schedule)
    if isinstance(method, RfInversionMethod):
        return Steered(method, model, schedule, guidance=guidance)
    kind = {None: Scheme[Schedule], "bias": Replay, "input_bias": ReplayShown, "latent_2": ExactPair}[method.extra]
    return kind(method, model, schedule, guidance=guidance)


def stacked(rows: Sequence[Row], name: str, device: torch.device) -> torch.Tensor:
    """The rows' tensors of this name, B first."""
    return torch.stack([row[name] for row in rows]).to(device)


def conditions(rows: Sequence[Row], device: torch.device) -> Condition:
    """The rows' conditions as one."""
    return {name: stacked([row["condition"] for row in rows], name, device) for name in rows[0]["condition"]}
