"""Whose fault it is when something goes wrong in a run, and what follows from that; docs/runtime.md has the table."""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Whose fault it is. An exception class that knows says so in its attribute ``fault``."""

    ROW = "row"
    """The row's own: it becomes an error row."""
    FILE = "file"
    """A damaged part of an input file: its rows become error rows."""
    TRANSIENT = "transient"
    """A disk's, a store's or a network's, and it passes: the work is done again, later."""
    PREEMPTED = "preempted"
    """The node's, or of who took it away: the work is done again, and counts against no row."""
    POISON = "poison"
    """The worker's own death, or its device's: its rows are suspects (`pipeline.run.deaths`)."""
    CHANGED = "changed"
    """The input or the output folder is not what was planned any more: the run ends and says what."""
    BUG = "bug"
    """Ours, or the stage's, which broke its contract: no data can be trusted, the run ends."""


def fault_of(error: BaseException) -> Fault:
    """Whose fault an exception is that ended a worker's task."""
    told = getattr(error, "fault", None)
    if isinstance(told, Fault):
        return told
    return Fault.TRANSIENT if isinstance(error, OSError) else Fault.BUG


def described(error: BaseException) -> str:
    """An exception in a line: its own words where it is made for people, else with its type before them."""
    text = " ".join(str(error).split())
    if isinstance(getattr(error, "fault", None), Fault):
        return text[:1000]
    return f"{type(error).__name__}: {text}"[:1000] if text else type(error).__name__
