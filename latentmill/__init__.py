"""latentmill from Python: what a script or a notebook needs, in one place. docs/python.md shows it at work.

Importing it loads nothing but this file; each name loads its module when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
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

_PACKAGES = ("jobs", "pipeline", "stages", "index", "micro")
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that they lie in, as this one does."""

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
    _take_our_own()
    module, _, own = _HOMES[name].partition(":")
    found = globals()[name] = getattr(importlib.import_module(module), own)
    return found


def _take_our_own() -> None:
    """Load our packages, whose names are plain: Python looks into a script's own folder first, and a folder `pipeline`
    or a file ``index.py`` there is not ours.

    Raises:
        ImportError: One of that name has been imported already.
    """
    sys.path.insert(0, _HOME)
    try:
        for name in _PACKAGES:
            with suppress(ModuleNotFoundError):  # `micro` may not be installed
                importlib.import_module(name)
    finally:
        sys.path.remove(_HOME)
    for name in _PACKAGES[:-1]:
        place = getattr(sys.modules.get(name), "__file__", None) or name
        if os.path.dirname(os.path.dirname(os.path.abspath(place))) != _HOME:
            raise ImportError(
                f"{place} was imported as {name!r}, which is a package of latentmill's too: give yours another name"
            )


def __dir__() -> list[str]:
    return __all__
