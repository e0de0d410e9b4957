"""Job files from Python: `load` gives the job model of a file or a mapping, `stage` a kind's stage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.schema import registry
from jobs.schema.base import RowJob
from jobs.schema.reading import JobFileError, load

if TYPE_CHECKING:
    from pipeline.contract import Stage

__all__ = ["JobFileError", "load", "stage"]


def stage(kind: str, **settings: Any) -> Stage:
    """The stage of a kind of job, to be called on an iterable of rows: no Ray, no files. Loads its models.

    Args:
        kind: As `job:` in a job file.
        settings: Keys of the job file.

    Raises:
        JobFileError: There is no such kind, or a setting will not do.
    """
    if kind in registry.kinds() and not issubclass(registry.find(kind), RowJob):
        raise JobFileError(f"a {kind} has no stage of its own; ask for that of one of its steps")
    job = load({"job": kind, "input": "rows", **settings})
    assert isinstance(job, RowJob)
    return job.stage().build()
