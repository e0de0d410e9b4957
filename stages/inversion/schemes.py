"""From latents to noise and back, by any method: what a stage does with a method's rule and with its extra state.

A picture whose method has no extra state comes back from its noise by the model's sampler. The others need what they
left beside it, in a row's column of that name: their `Scheme` makes it on the way up and uses it on the way down.

Legend: B rows; `z_BCHW` latents; S steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from pipeline.contract import Row, failed
from stages.engine.gradients import loss_scale
from stages.engine.passthrough import in_batches
from stages.engine.solver import Occupancy, solve
from stages.inversion import pairs
from stages.inversion.engine import InversionProblem
from stages.inversion.lbo import replay_bias
from stages.inversion.null_text import generate_null_text, learn_null_text
from stages.inversion.settings import EdictMethod, InversionMethod, NullTextMethod
from stages.models.latent import Condition, Geometry, LatentModel
from stages.models.sampler import sample


class Scheme:
    """A method without extra state: up by its rule, down by the model's sampler.

    Attributes:
        guided: Conditions need their negative side.
        keep_path: Rows leave the solver with every z_t.
    """

    keep_path = False

    def __init__(self, method: InversionMethod, model: LatentModel, *, steps: int, guidance: float) -> None:
        self.method, self.model, self.guidance = method, model, guidance
        self.guided = guidance > 1
        self.schedule = model.schedule(steps)
        self.predict = model.predictor(guidance)

    def problem(self, slots: int) -> InversionProblem:
        """The walk of `slots` rows up the schedule."""
        denoiser = next(iter(self.model.geometry.parts))
        rule = self.method.rule(self.guidance, torch.finfo(self.model.dtypes[denoiser]).eps)
        return InversionProblem(
            self.predict, self.schedule, rule, slots=slots, device=self.model.device,
            latent_shape=self.model.geometry.latent_shape, keep_path=self.keep_path,
            half=self.model.dtypes[denoiser] == torch.float16,
        )  # fmt: skip

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        """Rows with `z` and `condition` to rows with `noise` (z_T), `forwards`, `backwards`, the extra state, and
        `residual` where there is one. Failed rows pass."""
        return solve(self.problem(slots), rows, occupancy=occupancy)

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        """z_0 from the noise and, where the method has it, the extra state (B, ...)."""
        return sample(self.predict, self.schedule, noise_BCHW, condition)


class Replay(Scheme):
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


class NullText(Scheme):
    """Null-text inversion: the pivot is inverted without guidance, and generation is guided by what was learned."""

    keep_path = True

    def __init__(self, method: NullTextMethod, model: LatentModel, *, steps: int, guidance: float) -> None:
        super().__init__(method, model, steps=steps, guidance=1.0)
        self.settings, self.guided = method, True

    def invert(self, rows: Iterable[Row], slots: int, occupancy: Occupancy) -> Iterator[Row]:
        return in_batches(super().invert(rows, slots, occupancy), slots, self._with_text)

    def _with_text(self, rows: Sequence[Row]) -> Iterator[Row]:
        learned = learn_null_text(
            self.predict, self.schedule, stacked(rows, "path", self.model.device),
            conditions(rows, self.model.device), guidance=self.settings.guidance, iterations=self.settings.iterations,
            scale=loss_scale(self.model.dtypes.values()),
        )  # fmt: skip
        for i, row in enumerate(rows):
            forwards, backwards = row["forwards"] + int(learned.forwards_B[i]), int(learned.backwards_B[i])
            yield {**row, "null_text": learned.null_BSLE[i].cpu(), "forwards": forwards, "backwards": backwards}

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        assert extra_B is not None
        return generate_null_text(
            self.predict, self.schedule, noise_BCHW, condition, extra_B, guidance=self.settings.guidance
        )


class ExactPair(Scheme):
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
            spent = {"forwards": passes * len(self.schedule), "backwards": 0}
            yield {**row, "noise": noise.cpu(), "latent_2": second.cpu(), **spent}

    def generate(self, noise_BCHW: torch.Tensor, condition: Condition, extra_B: torch.Tensor | None) -> torch.Tensor:
        assert extra_B is not None
        pair = (noise_BCHW, extra_B)
        if isinstance(self.method, EdictMethod):
            return pairs.edict_generate(self.predict, self.schedule, pair, condition, self.method.mixing)
        return pairs.belm_generate(self.predict, self.schedule, pair, condition)


def check_method(method: InversionMethod, geometry: Geometry) -> None:
    """Refuse a method that this model's equation is not made for.

    Raises:
        ValueError: It is one.
    """
    kind = "diffusion" if geometry.grid is None else "flow"
    if kind not in method.inverts:
        what = "a rectified flow" if kind == "flow" else "a variance-preserving diffusion"
        instead = "euler, uni-inv or lbo" if kind == "flow" else "ddim, uni-inv or lbo"
        raise ValueError(
            f"method {method.label} does not invert {what}, which model {geometry.sizes.model!r} is: take {instead}"
        )


def scheme_of(method: InversionMethod, model: LatentModel, *, steps: int, guidance: float) -> Scheme:
    """How a method takes this model's latents to noise and back.

    Raises:
        ValueError: It does not.
    """
    check_method(method, model.geometry)
    if isinstance(method, NullTextMethod):
        return NullText(method, model, steps=steps, guidance=guidance)
    kind = {None: Scheme, "bias": Replay, "latent_2": ExactPair}[method.extra]
    return kind(method, model, steps=steps, guidance=guidance)


def stacked(rows: Sequence[Row], name: str, device: torch.device) -> torch.Tensor:
    """The rows' tensors of this name, B first."""
    return torch.stack([row[name] for row in rows]).to(device)


def conditions(rows: Sequence[Row], device: torch.device) -> Condition:
    """The rows' conditions as one."""
    return {name: stacked([row["condition"] for row in rows], name, device) for name in rows[0]["condition"]}
