"""A step of the engine as one CUDA graph: the network and what a walk does around it, launched together (ours).

Only a step in which every slot holds a row is a recorded one. Others go operation by operation, so that the network is
not shown empty slots; both give the same, up to the kernels that PyTorch chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipeline.failures import Fault
from stages.engine.device import chosen_devices
from stages.engine.solver import capture
from stages.models.latent import Geometry
from stages.models.multistep import Multistep
from stages.models.schedule import Schedule, Step
from stages.models.settings import SamplingSettings


class Recordable(Protocol):
    """A walk (`stages.inversion.engine`).

    Attributes:
        changing: Names of what a step changes: tensors, or trees of them; None where there is none.
        now: Each row's equation; it follows from them.
    """

    changing: Sequence[str]
    now: Step

    def equation(self) -> Step:
        """What `now` is."""

    def advance_all(self) -> None:
        """A step, all of whose slots hold rows."""


class Unrecordable(RuntimeError):
    """The device refuses to record a step."""

    fault = Fault.BUG


class RecordedStep:
    """A step of a walk, recorded; calling it makes one. `now` is left behind.

    A graph reads and writes at fixed addresses, while a rule hands on new tensors. So there is a copy of each tensor
    that a step may change (`own`): the graph reads these and ends by writing them, and the walk holds them afterwards.
    What it only reads (conditions, the schedule) has to stay where it is for as long as this is used.

    Args:
        walk: All of its slots hold rows, which are where they were afterwards. It is not kept: whoever drops the walk
            frees the graph's memory.

    Raises:
        Unrecordable: Nothing can be recorded here, whatever the rows are.
        torch.OutOfMemoryError: It does not fit.
    """

    def __init__(self, walk: Recordable) -> None:
        self.names = [name for name in walk.changing if getattr(walk, name) is not None]
        before, self.shape = tree_flatten([getattr(walk, name) for name in self.names])
        self.own: list[torch.Tensor] = [value.clone() for value in before]
        self.places = {own.untyped_storage().data_ptr() for own in self.own}
        try:
            self.replay: Callable[[], None] = capture(partial(self._advance, walk))  # moves the rows in `own` on
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unrecordable(
                f"accelerate: graph: a step cannot be recorded on this device ({reason}): leave `accelerate` out"
            ) from error
        self._hold(walk, before)

    def __call__(self, walk: Recordable) -> None:
        self._hold(walk, self._held(walk))
        self.replay()

    def _advance(self, walk: Recordable) -> None:
        self._hold(walk, self.own)
        walk.now = walk.equation()
        walk.advance_all()
        self._hold(walk, self._held(walk))

    def _held(self, walk: Recordable) -> list[torch.Tensor]:
        return tree_flatten([getattr(walk, name) for name in self.names])[0]

    def _hold(self, walk: Recordable, values: Sequence[torch.Tensor]) -> None:
        """Copy values into `own`, and have the walk hold these."""
        moved = [(own, value) for own, value in zip(self.own, values, strict=True) if own is not value]
        # A value that lies in another one's place would be overwritten before it is read.
        apart = [value.clone() if value.untyped_storage().data_ptr() in self.places else value for _, value in moved]
        for (own, _), value in zip(moved, apart, strict=True):
            own.copy_(value)
        for name, value in zip(self.names, tree_unflatten(self.own, self.shape), strict=True):
            setattr(walk, name, value)


def check_recordable(settings: SamplingSettings, geometry: Geometry, schedule: Schedule | Multistep) -> None:
    """Refuse ``accelerate: graph`` where steps are none that can be recorded.

    Raises:
        ValueError: Which, and what to do.
    """
    instead = "leave `accelerate` out, or set `accelerate: compile`"
    if not geometry.recordable:
        raise ValueError(
            f"accelerate: graph: what the denoiser of model {settings.model!r} computes depends on numbers that the "
            f"host has to read in each pass, or sends to the device in each, so that no pass can be recorded: {instead}"
        )
    if settings.quantization_config:
        raise ValueError(f"accelerate: graph takes no `quantization_config`: {instead}")
    if isinstance(schedule, Multistep):
        raise ValueError(
            "accelerate: graph: the steps of the model's sampler hang together, and which point comes next is read by "
            f"the host: leave `sampler` out, or {instead}"
        )


def check_card(settings: SamplingSettings) -> None:
    """Refuse ``accelerate: graph`` on what is no single card of CUDA's.

    Raises:
        ValueError: Which devices there are, and what to do.
    """
    devices = chosen_devices(settings.device)
    if len(devices) > 1 or torch.device(devices[0]).type != "cuda":
        raise ValueError(
            f"accelerate: graph records steps for one CUDA device a worker, and this one works on "
            f"{', '.join(devices)}: leave `accelerate` out, or set `resources: {{gpus: 1}}` where there are GPUs"
        )
