"""Options that more than one command takes for a job."""

from __future__ import annotations

from typing import Annotated

import typer

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="OUT", help="Folder of the dataset; replaces the job's `output`."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Replace one key, resources.gpus=1; may be repeated."),
]
