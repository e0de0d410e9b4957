"""One batched solver for every method: a variable a row, a loss a row, a stopping rule a row.

The solver holds `slots` rows, advances all of them at once, lets each row stop by itself and gives the freed slot to
the next waiting row (continuous batching, ours). The tensors' shapes never change while it runs: an empty slot is
masked, and a problem need not show it to its network.

Legend: B slots; `x_B...` has one leading entry a slot; `active_B`, `done_B`, `which_B` are boolean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from pipeline.contract import Row, halvings
from stages.engine.room import Room, release


class Problem(Protocol):
    """A frozen network and one variable a slot, in tensors that are allocated once.

    A row may pass through several sub-problems (timesteps) inside `step` without leaving its slot; it is done when the
    last one is. A problem may also offer `resize(slots)`: forget all rows and reallocate for fewer slots; `solve` then
    survives running out of device memory. And `quiet()`: how many steps come, 1 at least, of which only the last can
    make a row done; `solve` then asks the device no sooner.
    """

    slots: int

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Write rows into free slots, and reset all state of those slots."""

    def step(self) -> torch.Tensor:
        """Advance every loaded slot once. Returns done_B: all that are done, in whichever step; a done row must no
        longer change until it is unloaded.

        What done_B says of empty slots is not looked at.
        """

    def unload(self, slots: Sequence[int]) -> list[Row]:
        """The finished rows of these slots, with their outputs; the slots are free afterwards."""


@dataclass
class Occupancy:
    """How full the solver was: filled in by `solve`, added up over calls."""

    steps: int = 0
    slot_steps: int = 0
    busy_slot_steps: int = 0
    rows: int = 0
    restarts: int = 0

    @property
    def share(self) -> float:
        """The share of slot steps that worked on a row (0 when nothing ran)."""
        return self.busy_slot_steps / self.slot_steps if self.slot_steps else 0.0


def solve(
    problem: Problem,
    rows: Iterable[Row],
    *,
    occupancy: Occupancy | None = None,
    poll: int = 1,
    room: Room | None = None,
) -> Iterator[Row]:
    """Solve every row's problem by continuous batching; rows come out as they finish.

    Rows that arrive with status "failed" pass through untouched and take no slot; so does `PAUSE`. When the device runs
    out of memory and the problem can `resize`, the rows in flight start again with half the slots; their random numbers
    are their own, so the result is the same.

    Args:
        problem: Holds the slots.
        rows: Read lazily, one for each freed slot.
        occupancy: Counts of slot steps, added to in place.
        poll: Least steps between two looks at done_B. A look waits for the device; finished rows idle until the next
            one.
        room: Told how many slots were left when the device ran out of memory, for whoever makes the next problem, and
            asked for relief where one slot alone does not fit. What it hears from others meanwhile is heeded as slots
            fall free.

    Raises:
        torch.OutOfMemoryError: One slot alone does not fit, without relief, or the problem cannot `resize`.
    """
    occupancy, room = occupancy or Occupancy(), room or Room()
    source = iter(rows)
    waiting: deque[Row] = deque()
    held: dict[int, Row] = {}
    while True:
        free = [slot for slot in range(min(problem.slots, room.rows)) if slot not in held]
        while len(waiting) < len(free):
            taken = list(islice(source, len(free) - len(waiting)))
            if not taken:
                break
            for row in taken:
                if row.get("status") == "failed":
                    yield row
                else:
                    waiting.append(row)
        full = False
        try:
            if free and waiting:
                batch = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                slots = free[: len(batch)]
                held.update(zip(slots, batch, strict=True))
                problem.load(slots, batch)
            if not held:
                return
            for _ in range(max(poll, problem.quiet() if hasattr(problem, "quiet") else 1)):
                done_B = problem.step()
                occupancy.steps += 1
                occupancy.slot_steps += problem.slots
                occupancy.busy_slot_steps += len(held)
        except torch.OutOfMemoryError:
            if not hasattr(problem, "resize"):
                raise
            if not room.halve(min(problem.slots, room.rows)) and not room.relieve():
                raise
            full = True
        if full:  # not before here: the error holds on to what the failed step had allocated
            waiting.extendleft(reversed(list(held.values())))
            held.clear()
            release()
            problem.resize(room.rows)  # type: ignore[attr-defined]
            room.rows = min(room.rows, problem.slots)
            occupancy.restarts += 1
            halvings.count()
            continue
        finished = [slot for slot, done in enumerate(done_B.tolist()) if done and slot in held]
        if finished:
            occupancy.rows += len(finished)
            for slot in finished:
                del held[slot]
            yield from problem.unload(finished)


def capture(step: Callable[[], None], warmup: int = 3) -> Callable[[], None]:
    """Record `step` as a CUDA graph and return its replay (static tensors in and out; no host synchronisation inside).

    The warm-up runs and the recording change the tensors that `step` changes: capture before rows are loaded.

    Raises:
        RuntimeError: No CUDA device.
        torch.OutOfMemoryError: The step, or its recording, does not fit.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device: set `accelerate: none` or `compile` in the job")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # On the stream that libraries have made their workspaces for: cuSOLVER's cannot be made while it is recorded
        # (pytorch issue 195731). Other threads may bring pictures to the device and fetch them meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        # Whatever ends a recording, its end is what is told: CUDA's refusal of a recording that broke off.
        if isinstance(error.__context__, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError("a graph of the step does not fit") from None
        raise
    return graph.replay
