"""latentmill from Python: what a script or a notebook needs, in one place. docs/python.md shows it at work.

Importing it loads nothing but this file; each name loads its module when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from index.reference import Reference as Reference
    from jobs.commands.progress_line import plain as print_progress
    from jobs.dataset import open_dataset as open_dataset
    from jobs.dry_run import DryRun as DryRun
    from jobs.dry_run import plan as plan
    from jobs.jobfile import JobFileError as JobFileError
    from jobs.jobfile import load as load_job
    from jobs.jobfile import stage as stage
    from jobs.report import write_report as write_report
    from jobs.run import JobResult as JobResult
    from jobs.run import run_job as run_job
    from pipeline.output.progress import Progress as Progress
    from pipeline.output.verify import verify as verify

    __version__: str

_HOMES = {
    "DryRun": "jobs.dry_run:DryRun",
    "JobFileError": "jobs.jobfile:JobFileError",
    "JobResult": "jobs.run:JobResult",
    "Progress": "pipeline.output.progress:Progress",
    "Reference": "index.reference:Reference",
    "load_job": "jobs.jobfile:load",
    "open_dataset": "jobs.dataset:open_dataset",
    "plan": "jobs.dry_run:plan",
    "print_progress": "jobs.commands.progress_line:plain",
    "run_job": "jobs.run:run_job",
    "stage": "jobs.jobfile:stage",
    "verify": "pipeline.output.verify:verify",
    "write_report": "jobs.report:write_report",
}
"""Name -> ``module:name`` where it lives."""

__all__ = [
    "DryRun",
    "JobFileError",
    "JobResult",
    "Progress",
    "Reference",
    "__version__",
    "load_job",
    "open_dataset",
    "plan",
    "print_progress",
    "run_job",
    "stage",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("latentmill")
    if name not in _HOMES:
        raise AttributeError(f"module 'latentmill' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, own = _HOMES[name].partition(":")
    found = globals()[name] = getattr(importlib.import_module(module), own)
    return found


def __dir__() -> list[str]:
    return __all__
