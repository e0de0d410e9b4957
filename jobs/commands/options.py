"""Options that more than one command takes for a job."""

from __future__ import annotations

from typing import Annotated

import typer

Output = Annotated[
    str | None, typer.Option("--output", "-o", help="Folder of the dataset; replaces the job's `output`.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="a.b=c", help="Replace one setting; may be repeated.")
]
