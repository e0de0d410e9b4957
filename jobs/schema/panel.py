"""A section of a report page, as a job hands it up: a plain value that knows neither the page nor the dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One section of the page.

    Attributes:
        title: Heading.
        draw: Makes markup (`jobs.page.html.Html`) from the dataset (`jobs.page.view.View`); an empty result leaves the
            panel out.
        note: A sentence below the heading.
    """

    title: str
    draw: Callable[[Any], str]
    note: str = ""
