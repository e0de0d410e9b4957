"""``OUT/report.html`` of a run or of a chain, with the panels of the jobs that made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.kinds.chain import read_listing
from jobs.page.html import shorten, tag
from jobs.page.report import REPORT_FILE, StepPart, render, render_chain
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from jobs.schema.registry import stored_job
from pipeline.access import granted


def write_report(output: str, job: RowJob | None = None, storage_options: Mapping[str, Any] | None = None) -> str:
    """Write the page of a run, or of a chain and its steps.

    Args:
        output: The run's or the chain's folder.
        job: The job that ran, for its own panels. Left out: rebuilt from the settings kept in the plan.
        storage_options: fsspec's, of the store that it lies on.

    Returns:
        The page's address.

    Raises:
        pipeline.output.planfile.OutputError: There is no run in the folder.
    """
    from pipeline.output.dataset import Output
    from pipeline.storage import Folder

    title = output.rstrip("/").rpartition("/")[2] or output
    with granted(output, storage_options):
        steps = read_listing(output) if job is None else None
        if steps is not None:
            page = render_chain([_step_part(output, step) for step in steps], title)
        else:
            view = View(Output.open(output))
            page = render(view, own_panels(job or stored_job(view.plan)), title)
        Folder.at(output).write(REPORT_FILE, page.encode("utf-8", "replace"))
    return f"{output.rstrip('/')}/{REPORT_FILE}"


def _step_part(output: str, step: Mapping[str, str]) -> StepPart:
    from pipeline.output.dataset import Output
    from pipeline.output.planfile import OutputError

    href = f"{step['output'].removeprefix(output.rstrip('/') + '/').rstrip('/')}/{REPORT_FILE}"
    try:
        view = View(Output.open(step["output"]))
    except OutputError:
        return StepPart(step["name"], step["job"], href, None)
    return StepPart(step["name"], step["job"], href, view, own_panels(stored_job(view.plan)))


def own_panels(job: RowJob | None) -> list[Panel]:
    """The job's own panels; a note in their place if it fails to name them."""
    if job is None:
        return []
    try:
        return job.panels()
    except Exception as error:
        message = f"The job's own panels are missing: {type(error).__name__}: {shorten(error, 200)}"
        return [Panel(job.job, lambda view: tag("p", message, class_="quiet"))]
