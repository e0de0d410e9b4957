"""``OUT/report.html``: one self-contained page that works offline, in light and dark, narrow and wide.

What it shows are panels: the general ones of `jobs.page.panels`, and those that the caller hands down. A panel that
raises becomes a note on the page: the report never fails a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.page import panels
from jobs.page.amounts import duration
from jobs.page.html import Html, escape, shorten, table, tag, words
from jobs.page.view import View
from jobs.schema.panel import Panel

REPORT_FILE = "report.html"
_STYLES = tuple(Path(__file__).with_name(name) for name in ("tokens.css", "report.css"))
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(view: View, own: Sequence[Panel], title: str) -> Html:
    """The page of one run as markup.

    Args:
        own: The job's own panels.
    """
    drawn = [(panel, _draw(panel, view)) for panel in panels.of_a_run(own)]
    sections = [_section(panel, content) for panel, content in drawn if content]
    links = [tag("a", panel.title, href=f"#{_anchor(panel.title)}") for panel, content in drawn if content]
    return _page(title, view.status.state, str(view.config.get("job", "dataset")), links, sections)


@dataclass(frozen=True)
class StepPart:
    """What the page of a chain knows of a step.

    Attributes:
        name: The step's name.
        job: Kind of its job.
        href: Address of its own page, from the chain's.
        view: Its output; None if it has not begun.
        own: Its job's own panels.
    """

    name: str
    job: str
    href: str
    view: View | None
    own: Sequence[Panel] = ()


def render_chain(steps: Sequence[StepPart], title: str) -> Html:
    """The page of a chain: its steps, how each ended, and what each one's job shows of itself."""
    states = [step.view.status.state if step.view else "not started" for step in steps]
    state = next((state for state in states if state != "complete"), "complete")
    rows = [_step_row(step, state) for step, state in zip(steps, states, strict=True)]
    listing = table(["Step", "Job", "State", "Ok", "Failed", "Time"], rows, numeric=(3, 4, 5))
    links = [tag("a", step.name, href=f"#{_anchor(step.name)}") for step in steps if step.view]
    sections = [_step_section(step, step.view) for step in steps if step.view]
    overview = tag("section", tag("h2", "Steps"), listing)
    return _page(title, state, f"chain of {len(steps)} steps", links, [overview, *sections])


def _step_row(step: StepPart, state: str) -> list[Any]:
    if step.view is None:
        return [step.name, step.job, tag("span", state, class_="pill"), "", "", ""]
    progress = step.view.status.progress
    return [
        tag("a", step.name, href=f"#{_anchor(step.name)}"),
        step.job,
        tag("span", state, class_=f"pill {state}"),
        f"{progress.rows_ok:,}",
        f"{progress.rows_failed:,}",
        duration(panels.seconds_at_work(step.view.records)),
    ]


def _step_section(step: StepPart, view: View) -> Html:
    drawn = [(panel, _draw(panel, view)) for panel in panels.of_a_step(step.own)]
    body = [[tag("h3", panel.title), panel.note, content] for panel, content in drawn if content]
    page = tag("p", tag("a", "the step's own page", href=step.href), class_="quiet")
    return tag("section", tag("h2", f"{step.name} ", tag("small", step.job)), body, page, id=_anchor(step.name))


def _page(title: str, state: str, what: str, links: Sequence[Html], sections: Sequence[Html]) -> Html:
    head = tag(
        "header",
        tag("p", "latentmill", class_="brand"),
        tag("h1", words(title, 80)),
        tag("p", tag("span", state, class_=f"pill {state}"), f" {what}", class_="sub"),
        tag("nav", links),
    )
    return document(f"{title} · latentmill", head, sections)


def document(title: str, head: Html, sections: Sequence[Html]) -> Html:
    """A whole page: its style inside, nothing fetched, no scripts allowed."""
    meta = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html("".join(style.read_text(encoding="utf-8") for style in _STYLES))),
    ]
    body = tag("body", head, tag("main", sections))
    return escape([Html("<!doctype html>\n"), tag("html", tag("head", meta), body, lang="en")])


def _draw(panel: Panel, view: View) -> str:
    try:
        return panel.draw(view)
    except Exception as error:  # a panel reads untrusted rows; the page must come out whatever it meets
        return tag("p", f"This panel could not be drawn: {type(error).__name__}: {shorten(error, 200)}", class_="quiet")


def _section(panel: Panel, content: str) -> Html:
    note = tag("p", panel.note, class_="quiet") if panel.note else None
    return tag("section", tag("h2", panel.title), note, content, id=_anchor(panel.title))


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
